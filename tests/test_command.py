"""Command: flags, exit codes, and errors in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LABELS, ROOT, Bench

import enrich_dataset as module

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


def test_the_key_may_come_from_a_file_or_the_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.server.gate.key = "my-key"
    key_file = bench.input.with_name("key")
    key_file.write_text("\ufeffmy-key \n", encoding="utf-8")
    assert bench.write(["cake"]).command("--quiet", "--api-key-file", str(key_file)) == 0
    monkeypatch.setenv("OPENAI_API_KEY", " my-key\n")
    monkeypatch.setenv("OPENAI_BASE_URL", bench.server.url)
    assert module.main(bench.write(["tram"]).arguments("--quiet")) == 0
    assert len(bench.server.calls) == 2


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


def test_a_program_whose_signal_handler_is_not_pythons_gets_it_back(bench: Bench) -> None:
    code = (
        "import ctypes, signal, sys\n"
        "handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.signal(signal.SIGTERM, handler)\n"
        "del sys.modules['_signal'], sys.modules['signal']\n"  # as it begins where a program has its own already
        "import signal\n"
        "assert signal.getsignal(signal.SIGTERM) is None\n"
        "import enrich_dataset\n"
        f"sys.exit(enrich_dataset.main({bench.write(['cake']).arguments('--base-url', bench.server.url)!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    bench.check()


def test_a_working_directory_that_is_gone_is_no_matter(bench: Bench, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    bench.write(["cake"])
    command = [sys.executable, str(ROOT / "enrich_dataset.py"), *bench.arguments("--base-url", bench.server.url)]
    code = f"import os, subprocess, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
    code += f"sys.exit(subprocess.call({command!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert bench.output.exists()
