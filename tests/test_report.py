"""Report: what is said before and after a run, and what its record holds."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import CODEBOOK, LABELS, Bench, expected, make_texts, write_examples
from stand_in_server import StandIn

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


def test_shares_by_the_label_column_say_shown_to_the_model_and_by_another_column_do_not(
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


def test_a_label_that_is_in_nearly_every_row_is_marked(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.write([f"violence {number}" for number in range(60)]).command() == 0
    line = "praising_violence: 60/60 (100.0%): in every row; check some by hand, or try --answer-form each\n"
    assert line in capsys.readouterr().out
    assert json.loads(Path(f"{bench.output}.run.json").read_text())["labels_in_nearly_every_row"] == [LABELS[0]]
    assert bench.write([*(f"violence {number}" for number in range(60)), "tram", "cake"]).command() == 0
    assert "praising_violence: 60/62 (96.8%): in nearly every row; check some by hand" in capsys.readouterr().out
    assert bench.write(["violence", "violence again"]).command() == 0
    assert "praising_violence: 2/2 (100.0%)\n" in capsys.readouterr().out


class TestDryRun:
    def test_a_dry_run_needs_no_key_sends_nothing_and_writes_nothing(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write([*make_texts(30), "tram", "tram", ""])
        arguments = bench.arguments("--dry-run")
        before = sorted(bench.input.parent.iterdir())
        assert module.main(arguments) == 0
        assert sorted(bench.input.parent.iterdir()) == before
        printed = capsys.readouterr().out
        for line in (
            "Dataset loaded: 33 rows",
            "Rows with a blank text (not sent, left blank): 1",
            "This will make 4 API calls instead of 32 (single-row processing)",
            "Distinct rows to send: 31",
            "Dry run: nothing was sent, nothing was written",
        ):
            assert f"{line}\n" in printed
        assert bench.server.calls == []

    def test_a_dry_run_returns_what_is_known(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich(limit=5)
        calls, before = len(bench.server.calls), bench.output.read_bytes()
        frame = bench.enrich(dry_run=True)
        assert frame[LABELS].head(5).astype(int).astype(str).to_numpy().tolist() == expected(bench.texts[:5])
        assert frame[LABELS].tail(15).isna().all(axis=None)
        assert len(bench.server.calls) == calls
        assert bench.output.read_bytes() == before

    @pytest.mark.parametrize("batch_size", [5, 20])
    def test_the_estimate_is_near_what_is_then_counted(
        self, bench: Bench, batch_size: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write([text * 4 for text in make_texts(100)])
        for basis, limit, least, most in (
            ("a guess, as long as", 40, 0.3, 1.5),
            ("as in 40 answers so far", 100, 0.8, 1.2),
        ):
            options = {"batch_size": batch_size, "limit": limit}
            capsys.readouterr()
            bench.enrich(**options, dry_run=True, quiet=False)
            printed = capsys.readouterr().out
            found = re.search(r"Estimated tokens \(schema included\): ([\d,]+) in, ([\d,]+) out", printed)
            assert found
            assert basis in printed
            bench.server.calls.clear()
            bench.enrich(**options)
            real = sum(call.prompt_tokens for call in bench.server.calls)
            assert 0.9 < int(found[1].replace(",", "")) / real < 1.1
            real = sum(call.completion_tokens for call in bench.server.calls)
            assert least < int(found[2].replace(",", "")) / real < most

    def test_a_dry_run_shows_what_would_be_sent_and_the_cost_last(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(["a text about cake", "another"]).command("--dry-run") == 0
        printed = capsys.readouterr().out
        assert "=== System message ===\nJudge each text" in printed
        assert '{"660":"a text about cake"}' in printed
        assert '"strict": true' in printed
        assert "another" not in printed
        assert printed.index("Estimated cost: about $0.0000") > printed.index("strict")

    def test_it_shows_instructions_and_texts_unchanged(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = bench.write(["a text about `limit` and cake"]).input.with_name("instructions.txt")
        path.write_text("Mind the `fresh` ones.")
        assert bench.command("--dry-run", "--instructions", str(path)) == 0
        printed = capsys.readouterr().out
        assert "Mind the `fresh` ones." in printed
        assert "a text about `limit` and cake" in printed
        assert "with --batch-api $" in printed

    def test_a_dry_run_counts_the_audit_and_says_whose_dollars_they_are(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(make_texts(20)).command("--dry-run", "--audit", "5") == 0
        printed = capsys.readouterr().out
        assert "Rows that the audit would send, each alone: 5\n" in printed
        assert re.search(
            r"Estimated cost: about \$[\d.]+, with --batch-api \$[\d.]+ \(what OpenAI would bill\)\n", printed
        )
        assert bench.command("--dry-run", "--base-url", "https://api.openai.com/v1") == 0
        assert "what OpenAI would bill" not in capsys.readouterr().out

    def test_the_estimate_of_an_unknown_model_has_no_price(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(["cake"]).command("--dry-run", "--model", "llama3.2") == 0
        assert "Estimated cost: unknown: no price of 'llama3.2' is known (pass --price)" in capsys.readouterr().out


def test_the_hash_of_the_record_is_that_of_what_was_read(bench: Bench) -> None:
    gold = bench.input.with_name("gold.csv")
    gold.write_text(f"text,{LABELS[0]}\nviolence,1\n")
    read = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (bench.write(["violence", "cake"]).input, gold)
    }

    def edit(number: int, body: Any) -> None:
        for path in read:
            path.write_text("something else")

    bench.server.on_call = edit
    bench.enrich(gold=gold)
    record = json.loads(Path(f"{bench.output}.run.json").read_text())
    assert [record["input_sha256"], record["gold_sha256"]] == list(read.values())


def test_what_pandas_copies_at_each_operation_stays_small(server: StandIn) -> None:

    frame = pd.DataFrame({"text": [f"text {number} poison-garbage" for number in range(300)]})
    told = module.enrich_dataframe(frame, "text", ["x"], base_url=server.url, batch_size=100).attrs["enrichment"]
    assert told["blank_row_count"] == 300
    assert len(told["blank_rows"]) == module.ATTRIBUTE_ROWS == 100


def test_the_shares_by_the_existing_label_end_the_summary(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.input.write_text("text,label\nviolence,hate\ncake,hate\ntram,nothate\nholiday,\n")
    arguments = bench.arguments("--label-column", "label", "--base-url", bench.server.url)
    assert module.main(arguments) == 0
    table = (
        capsys.readouterr()
        .out.partition("=== Share of each label by 'label' (shown to the model) ===\n")[2]
        .splitlines()
    )
    assert table[0].split() == ["hate", "nothate", "(blank)"]
    assert table[1].split() == ["praising_violence", "50.0%", "0.0%", "0.0%"]


class TestRecord:
    def test_it_has_what_an_appendix_needs_and_no_key_and_no_text(self, bench: Bench) -> None:
        texts = [f"{text}, my own words" for text in make_texts(30)]
        examples = write_examples(bench, "a secret example")
        bench.write(texts).enrich(CODEBOOK, examples=examples, audit=5, api_key="sk-secret", seed=4)
        path = Path(f"{bench.output}.run.json")
        written = path.read_text(encoding="utf-8")
        assert "own words" not in written
        assert "secret" not in written
        record = json.loads(written)
        assert record["labels"] == CODEBOOK
        assert record["parameters"]["seed"] == 4
        assert record["input_sha256"] == hashlib.sha256(bench.input.read_bytes()).hexdigest()
        assert record["rows"]["table"] == record["rows"]["labelled"] == 30
        assert set(record["versions"]) == {"enrich_dataset", "python", "openai", "pandas"}
        (served,) = record["served"]
        assert {name: served[name] for name in ("answers", "model", "system_fingerprint")} == {
            "answers": 30, "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_stand_in",
        }  # fmt: skip
        assert record["this_run"]["started_at"][:10] <= served["first_at"][:10] <= served["last_at"][:10]
        (prompt,) = record["prompts"]
        assert "what praising_violence means" in prompt["system_message_without_examples"]
        assert prompt["response_format"] == bench.server.calls[0].body["response_format"]
        assert (prompt["answers"], prompt["examples"]) == (30, 1)
        assert record["this_run"]["calls"] == 8
        assert record["this_run"]["dollars"] > 0
        assert record["all_runs_on_this_store"]["calls"] == 8
        assert record["counts"][LABELS[0]]["ones"] + record["counts"][LABELS[0]]["zeros"] == 30
        assert record["blank_rows"] == []
        assert record["audit"][LABELS[0]]["rows"] == 5

    def test_numpys_strings_are_strings_in_it(self, bench: Bench) -> None:

        bench.write(["cake"]).enrich(model=np.str_("gpt-4o-mini"))
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["parameters"]["model"] == "gpt-4o-mini"

    def test_blank_rows_stand_in_it_with_their_reasons(self, bench: Bench) -> None:
        bench.write(["cake", "poison-refusal", ""]).enrich()
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["blank_rows"] == [{"row": 1, "line": 3, "reason": "the model refused to answer"}]
        assert record["counts"][LABELS[0]] == {"ones": 0, "zeros": 1, "blank": 2}
        assert record["this_run"]["calls"] == 5  # both rows, the probe, each row, and the refused one again

    def test_it_names_every_prompt_that_was_asked_of_these_labels_with_its_answers(self, bench: Bench) -> None:
        bench.write(make_texts(30)).enrich(LABELS[:2], limit=20)
        bench.enrich(LABELS)
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        prompts = {tuple(prompt["labels"]): prompt for prompt in record["prompts"]}
        assert {labels: prompt["answers"] for labels, prompt in prompts.items()} == {
            tuple(LABELS[:2]): 20, (LABELS[2],): 20, tuple(LABELS): 10,
        }  # fmt: skip
        sent = {call.body["messages"][0]["content"] for call in bench.server.calls}
        assert {prompt["system_message_without_examples"] for prompt in prompts.values()} == sent
        bench.enrich(LABELS[:2])
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert [prompt["labels"] for prompt in record["prompts"]] == [LABELS[:2], LABELS]
        assert record["served"][0]["answers"] == 30

    def test_it_has_the_parameters_that_were_really_sent_and_the_models_that_answered(self, bench: Bench) -> None:
        bench.write(make_texts(40)).enrich(limit=10)
        bench.server.gate.refuses = {"temperature"}
        completion = {"choices": [{"message": {"content": '{"660": []}'}}], "model": "gpt-4o-mini-2026-12-01"}
        bench.server.script.extend([None] * 4 + [(200, {}, completion)])
        bench.enrich(limit=30, quiet=False, max_workers=1, batch_size=1)
        bench.enrich(use_batch_api=True, poll_interval=0.05)
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert [(part["answers"], part.get("temperature"), part["tier"]) for part in record["sent_with"]] == [
            (10, 0.0, "standard"), (20, None, "standard"), (10, None, "batch"),
        ]  # fmt: skip
        assert {part["format"] for part in record["sent_with"]} == {"a strict schema"}
        assert {part["model"]: part["answers"] for part in record["served"]} == {
            "gpt-4o-mini-2024-07-18": 39, "gpt-4o-mini-2026-12-01": 1,
        }  # fmt: skip

    def test_it_tells_the_requested_rows_from_those_of_the_table_and_hashes_what_was_read(self, bench: Bench) -> None:
        gold = bench.input.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\ncake,1\n")
        bench.write(["cake", "", "tram", "holiday"]).enrich(limit=2, gold=gold)
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["rows"] == {"table": 4, "requested": 2, "without_text": 1, "from_examples": 0, "labelled": 1}
        assert record["counts"][LABELS[0]]["blank"] == 1
        assert record["counts_of_the_whole_table"][LABELS[0]]["blank"] == 3
        assert record["gold_sha256"] == hashlib.sha256(gold.read_bytes()).hexdigest()

    def test_two_runs_alike_write_the_same_but_for_times_and_calls(self, bench: Bench) -> None:
        records = []
        bench.write(make_texts(10))
        for _ in range(2):
            bench.enrich()
            records.append(json.loads(Path(f"{bench.output}.run.json").read_text()))
            records[-1].pop("this_run")
        assert records[0] == records[1]


@pytest.mark.every_form
def test_many_blank_rows_are_counted_and_some_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(["cake", *(f"poison-garbage {number}" for number in range(25))])
    assert bench.command("--batch-size", "1", "--max-workers", "8") == 3
    printed = capsys.readouterr().out
    assert printed.count(": the answer was not valid JSON") == 20
    assert "  and 5 more\n" in printed
    assert "personal_attacks: 0/1 (0.0%), 25 blank" in printed
