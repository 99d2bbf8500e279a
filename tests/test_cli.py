"""The command: what it prints, its exit codes, its one-line errors."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import LABELS, ROOT, Bench, expected, make_texts

import enrich_dataset as module

REPORT = """\
Loading dataset from {input}...
Dataset loaded: 38 rows
Text column: 'text'
New labels to add: ['praising_violence', 'personal_attacks', 'sexual_harassment']
Batch size: 10 rows per API call
Parallel workers: 3

Starting parallel enrichment from row 0...
Total batches to process: 4
Processing 3 batches simultaneously...
This will make 4 API calls instead of 38 (single-row processing)


✓ Enrichment complete!
✓ Enriched dataset saved to {output}
✓ Total API calls made: 4 (saved 34 API calls!)
✓ Speedup from parallelization: ~#x faster
✓ Tokens: # in, # out
✓ Cost: $# (what OpenAI would bill)

=== Summary ===
praising_violence: 13/38 (34.2%)
personal_attacks: 13/38 (34.2%)
sexual_harassment: 13/38 (34.2%)
"""


def test_the_report_word_for_word(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.server.model.first_token = 0.05
    assert bench.write(make_texts(38)).command() == 0
    printed = re.sub(r"~\d+(\.\d)?x", "~#x", capsys.readouterr().out)
    printed = re.sub(r"Tokens: [\d,]+ in, \d+ out", "Tokens: # in, # out", printed)
    printed = re.sub(r"Cost: \$0\.000\d+", "Cost: $#", printed)
    printed = re.sub(r": \d+/38 \(\d+\.\d%\)", ": 13/38 (34.2%)", printed)
    assert printed == REPORT.format(input=bench.input, output=bench.output)


def test_the_summary_counts_what_is_in_the_file(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.write([*make_texts(38), "", " "]).command() == 0
    ones = sum(cells[0] == "1" for cells in bench.cells)
    printed = capsys.readouterr().out
    assert f"praising_violence: {ones}/38 ({ones / 38:.1%}), 2 blank\n" in printed
    assert "Rows with a blank text (not sent, left blank): 2\n" in printed


def test_the_speedup_is_the_calls_own_seconds_over_the_wall_clock(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.server.model.first_token = 0.3
    bench.write(make_texts(80)).command("--max-workers", "4")
    found = re.search(r"~(\d+\.?\d*)x faster", capsys.readouterr().out)
    assert found
    assert 2 < float(found[1]) <= 4


def test_what_is_known_already_is_said(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(["cake", "cake", "tram"]).command("--quiet")
    assert bench.command() == 0
    printed = capsys.readouterr().out
    assert "Rows already labelled (not sent again): 3\nNothing to send: no API call is made\n" in printed
    assert "Total API calls made: 0\n" in printed


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_a_run_that_labels_no_row_is_not_called_complete(
    bench: Bench, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.write(texts).command() == 0
    printed = capsys.readouterr().out
    assert "Enrichment complete" not in printed
    assert "✗ No row was labelled: no row has a text\n" in printed


def test_rows_that_wait_in_a_job_hide_no_saved_calls(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.server.batches.seconds = 60
    bench.write(make_texts(50)).enrich(use_batch_api=True, no_wait=True)
    assert bench.write(make_texts(100)).command() == 3
    assert "Total API calls made: 5 (saved 45 API calls!)\n" in capsys.readouterr().out


def test_saved_calls_count_rows_that_are_sent_twice_twice(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.write(make_texts(38)).command("--audit", "10") == 0
    assert "Total API calls made: 14 (saved 34 API calls!)\n" in capsys.readouterr().out


def test_equal_rows_and_another_encoding_are_said(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.input.write_bytes(b"text\ncaf\xe9\ncaf\xe9\n")
    assert bench.command() == 0
    printed = capsys.readouterr().out
    assert "Encoding: cp1252, since the file is not UTF-8\n" in printed
    assert "Duplicate rows (sent once): 1\n" in printed


def test_quiet_prints_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.write(make_texts(5)).command("--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_where_no_terminal_is_the_bar_is_a_few_lines(bench: Bench) -> None:
    bench.server.model.first_token = 0.02
    process = bench.write(make_texts(300)).process("--batch-size", "2")
    _, errors = process.communicate(timeout=60)
    lines = errors.splitlines()
    assert 1 <= len(lines) <= 3
    assert re.match(r"Processing batches: 100%.*150/150 \[", lines[-1])
    assert "\r" not in errors


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_the_check_mark_gets_a_plain_sign(bench: Bench, encoding: str) -> None:
    output = bench.output.with_name("héllo 賞.csv")
    arguments = ["--output", str(output), "--base-url", bench.server.url]
    program = [sys.executable, str(ROOT / "enrich_dataset.py"), *bench.write(["cake"]).arguments(*arguments)]
    run = subprocess.run(program, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True)
    assert b"* Enrichment complete!" in run.stdout
    assert output.exists()


WRONG = {
    "no arguments": ([], "the following arguments are required"),
    "batch size": (["--batch-size", "0"], "--batch-size must be from 1 to 500, not 0."),
    "batch size text": (["--batch-size", "ten"], "--batch-size must be a whole number or auto, not 'ten'"),
    "workers": (["--max-workers", "501"], "--max-workers must be from 1 to 500, not 501."),
    "limit": (["--limit", "0"], "--limit must be at least 1, not 0."),
    "timeout": (["--timeout", "0"], "--timeout must be from 0.001 to 86400, not 0."),
    "timeout nan": (["--timeout", "nan"], "--timeout must be"),
    "retries": (["--max-retries", "-1"], "--max-retries must be"),
    "start": (["--start-index", "3"], "--start-index 3 is past the last row"),
    "start below": (["--start-index", "-1"], "--start-index must be at least 0"),
    "model": (["--model", " "], "--model is blank"),
    "label twice": (["--labels", "a", "b", "a"], "The label 'a' appears more than once"),
    "label blank": (["--labels", "a", " "], "A label must be a name of printable characters, not ' '"),
    "label with commas": (
        ["--labels", "racist,sexist"],
        "The label 'racist,sexist' has a comma in it: separate labels by spaces.",
    ),
    "label with a comma": (["--labels", "racist,", "sexist"], "separate labels by spaces"),
    "label with blanks": (["--labels", "racist "], "The label 'racist ' begins or ends with whitespace"),
    "labels that differ in case": (
        ["--labels", "racist", "Racist"],
        "The labels 'racist' and 'Racist' differ only in case",
    ),
    "label is the text column": (["--labels", "text"], "'text' is already the text, label or context column"),
    "by": (["--by", "source"], "The --by column 'source' is not in the header"),
    "label with newline": (["--labels", "a\nb"], "printable"),
    "text column": (["--text-column", "texts"], "which has 'id', 'text'"),
    "label column": (["--label-column", "label"], "The column 'label' is not in the header"),
    "label is the id": (
        ["--labels", "id"],
        "the column 'id' holds '2', not 1, 0, true, false or blank: choose a different name",
    ),
    "input": (["--input", "nowhere.csv"], "There is no file nowhere.csv"),
    "output folder": (["--output", "nowhere/out.csv"], "There is no folder nowhere"),
    "output is a folder": (["--output", "."], "is a folder"),
    "output is input": (["--output", "in.csv"], "The output and the input are the same file"),
    "store is input": (["--store", "in.csv"], "The store and the input are the same file"),
    "store is output": (["--store", "out.csv"], "The output and the store are the same file"),
    "url": (["--base-url", "localhost:8000/v1"], "--base-url must begin with http://"),
    "key": (["--api-key", "sk-ab\u00a0c"], "invalid character at position 6"),
    "two keys": (["--api-key", "a", "--api-key-file", "b"], "not allowed with"),
    "key file": (["--api-key-file", "nowhere"], "The key file nowhere cannot be read"),
    "no key": (["--base-url", "https://api.openai.com/v1"], "No API key: set OPENAI_API_KEY"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_exit_2_and_nothing_written(
    bench: Bench, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more, message = WRONG[name]
    bench.write(["cake", "tram", "sun"])
    monkeypatch.chdir(bench.input.parent)
    base = ["--input", "in.csv", "--output", "out.csv", "--text-column", "text", "--base-url", bench.server.url]
    labels = [] if "--labels" in more else ["--labels", *LABELS]
    try:
        code = module.main([*base, *labels, *more] if more else [])
    except SystemExit as left:
        code = left.code
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1
    assert "sk-ab" not in errors
    assert [path.name for path in Path().iterdir()] == ["in.csv"]
    assert bench.server.calls == []


def test_in_python_a_label_may_hold_commas_joiners_and_odd_blanks_and_labels_be_any_sequence(bench: Bench) -> None:
    labels = ["attacks, of any kind", "\u0645\u06cc\u200c\u062e", "\U0001f468\u200d\U0001f469", "a\u00a0b"]
    bench.write(["an attack"])
    for given in (labels, pd.Series(labels), pd.Index(labels), np.array(labels), (label for label in labels)):
        frame = bench.enrich(given)  # type: ignore[arg-type]
        assert list(frame[labels].iloc[0]) == [1, 0, 0, 0]
    assert len(bench.server.calls) == 1


def test_help_is_grouped_and_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    headings = re.findall(r"^([a-zA-Z ]+):$", shown, re.MULTILINE)
    assert headings == [
        "options", "input and output", "model and server", "speed", "cost", "better labels", "checking labels",
        "Batch API", "example",
    ]  # fmt: skip
    assert "  python enrich_dataset.py --input HatefulData.csv" in shown.partition("example:\n")[2]


def test_the_default_model_changes_on_the_day_on_which_the_old_one_ends(bench: Bench) -> None:
    assert module.default_model(date(2027, 1, 13)) == "gpt-4o-mini"
    assert module.default_model(date(2027, 1, 14)) == "gpt-6-luna"
    bench.write(["cake"]).enrich()
    arguments = [
        word for word in bench.arguments("--base-url", bench.server.url) if word not in {"--model", "gpt-4o-mini"}
    ]
    code = "import datetime, sys\nday = datetime.date(2027, 1, 14)\n"
    code += "datetime.date = type('date', (datetime.date,), {'today': staticmethod(lambda: day)})\n"
    code += f"import enrich_dataset\nsys.exit(enrich_dataset.main({arguments!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Model: gpt-6-luna, the default since 2027-01-14, on which gpt-4o-mini was shut down\n" in run.stdout
    assert re.search("^model gpt-4o-mini +1 ", run.stdout, re.MULTILINE)
    assert bench.server.calls[-1].body["model"] == "gpt-6-luna"


@pytest.mark.parametrize("window", [{"limit": 20}, {"start_index": 30}])
def test_counts_are_about_the_rows_requested(
    bench: Bench, window: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(make_texts(50)).enrich(quiet=True, limit=40)
    frame = bench.enrich(quiet=False, **window)
    printed = capsys.readouterr().out
    requested = slice(window.get("start_index", 0), window.get("start_index", 0) + 20)
    ones = sum(cells[0] == "1" for cells in expected(bench.texts)[requested])
    assert f"praising_violence: {ones}/20 " in printed
    assert frame.attrs["enrichment"]["requested_rows"] == frame.attrs["enrichment"]["labelled_rows"] == 20


def test_a_stopped_run_counts_the_rows_requested(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.server.script.extend([None, (401, {}, {})])
    assert bench.write(make_texts(50)).command("--limit", "20", "--max-workers", "1") == 1
    assert "Stopped: 10 of 20 rows are labelled" in capsys.readouterr().err


def test_shares_are_broken_down_by_a_column_that_is_never_sent(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.input.write_text("text,party,label\nviolence,left,x\ncake,left,x\ntram,right,x\n")
    assert bench.command("--by", "party") == 0
    printed = capsys.readouterr().out
    table = printed.partition("=== Share of each label by 'party' ===\n")[2].splitlines()
    assert table[0].split() == ["left", "right"]
    assert table[1].split() == ["praising_violence", "50.0%", "0.0%"]
    assert "left" not in json.dumps(bench.server.calls[0].body)
    record = json.loads(Path(f"{bench.output}.run.json").read_text())["shares_by"]
    assert record == {"column": "party", "shares": record["shares"]}
    assert record["shares"]["praising_violence"] == {"left": 0.5, "right": 0.0}
    assert bench.command("--by", "party", "--label-column", "label") == 0
    assert "by 'party' ===" in capsys.readouterr().out
    assert bench.command("--label-column", "label") == 0
    assert "=== Share of each label by 'label' (shown to the model) ===" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"price": 0.5}, r"price must be 2 numbers \(IN, OUT\), not 0.5"),
        ({"max_cost": (1, 2)}, r"max_cost must be a number, not \(1, 2\)"),
        ({"answer_form": "long"}, "answer_form must be list, each, one, not 'long'"),
        ({"batch_size": 2.5}, "whole number or auto, not 2.5"),
        ({"batch_size": True}, "whole number or auto, not True"),
        ({"timeout": None}, "timeout must be a number, not None"),
        ({"limit": "auto"}, "limit must be a whole number, not 'auto'"),
        ({"new_labels": "racist"}, r"pass \['racist'\]"),
        ({"new_labels": []}, "pass at least one"),
        ({"new_labels": [None]}, "printable"),
    ],
)
def test_what_only_python_can_get_wrong(bench: Bench, options: dict[str, object], message: str) -> None:
    with pytest.raises(module.InputError, match=message):
        bench.write(["cake"]).enrich(**({"labels": options.pop("new_labels", LABELS)} | options))  # type: ignore[arg-type]


def test_the_key_may_come_from_a_file_or_the_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.server.gate.key = "my-key"
    key_file = bench.input.with_name("key")
    key_file.write_text("\ufeffmy-key \n", encoding="utf-8")
    assert bench.write(["cake"]).command("--quiet", "--api-key-file", str(key_file)) == 0
    monkeypatch.setenv("OPENAI_API_KEY", " my-key\n")
    monkeypatch.setenv("OPENAI_BASE_URL", bench.server.url)
    assert module.main(bench.write(["tram"]).arguments("--quiet")) == 0
    assert len(bench.server.calls) == 2


def test_another_server_than_openais_needs_no_key(bench: Bench) -> None:
    bench.server.gate.key = "none"
    assert bench.write(["cake"]).command("--quiet") == 0


def test_each_default_is_written_once(bench: Bench) -> None:
    options = vars(module.build_parser().parse_args(bench.arguments()))
    for name, parameter in inspect.signature(module.enrich_dataset).parameters.items():
        assert name in options
        if parameter.default is not parameter.empty:
            assert options[name] == parameter.default


def test_the_users_ten_parameters_stand_first_and_the_rest_are_by_name() -> None:
    parameters = inspect.signature(module.enrich_dataset).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "input_filepath", "output_filepath", "text_column", "label_column", "new_labels", "api_key", "model",
        "batch_size", "start_index", "max_workers",
    ]  # fmt: skip


def test_help_and_version_answer_without_the_heavy_packages() -> None:
    code = "import sys, enrich_dataset as m\nm.main(sys.argv[1:])"
    for flag in ("--help", "--version"):
        check = "import atexit, sys\natexit.register(lambda: print({'pandas', 'openai', 'tqdm'} & set(sys.modules)))\n"
        run = subprocess.run([sys.executable, "-c", check + code, flag], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0
        assert run.stdout.endswith("set()\n")


def test_no_traceback_and_no_text_reaches_the_user_of_a_bug(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORDING", "{a_bug}")
    assert bench.write(["my secret"]).command("--labels", "a label of this test alone") == 1
    errors = capsys.readouterr().err
    first, *frames = errors.partition("Error: ")[2].splitlines()
    assert first == "unexpected KeyError; please report these lines. What came back is kept."
    assert re.fullmatch(r"  enrich_dataset\.py, line \d+, in system_message", frames[-1])
    assert re.fullmatch(r"  enrich_dataset\.py, line \d+, in main", frames[0])
    assert "secret" not in errors
    assert "Traceback" not in errors


def test_a_label_that_is_in_nearly_every_row_is_marked(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.write([f"violence {number}" for number in range(60)]).command() == 0
    line = "praising_violence: 60/60 (100.0%): in every row; check some by hand, or try --answer-form each\n"
    assert line in capsys.readouterr().out
    assert json.loads(Path(f"{bench.output}.run.json").read_text())["labels_in_nearly_every_row"] == [LABELS[0]]
    assert bench.write([*(f"violence {number}" for number in range(60)), "tram", "cake"]).command() == 0
    assert "praising_violence: 60/62 (96.8%): in nearly every row; check some by hand" in capsys.readouterr().out
    assert bench.write(["violence", "violence again"]).command() == 0
    assert "praising_violence: 2/2 (100.0%)\n" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "words"), [({"model": None}, "model is blank"), ({"labels": None}, "No labels")])
def test_none_for_what_has_to_be_given_is_refused(bench: Bench, given: dict[str, Any], words: str) -> None:
    with pytest.raises(module.InputError, match=words):
        bench.write(["cake"]).enrich(**given)
