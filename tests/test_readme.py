"""The README and the example do what they say."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from stand_in_server import StandIn

import enrich_dataset as module

README = (ROOT / "ENRICHMENT_README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, cells without backticks."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_it_has_300_lines_and_no_paragraph_of_more_than_four_sentences() -> None:
    assert len(README.splitlines()) <= 300
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for paragraph in re.split(r"\n\n|\n(?=[-\d#|])", prose):
        sentences = re.split(r"[.!?]\*{0,2}\s+(?=[A-Z*`\"])", re.sub(r"^(\d\. |- |\*\*\d\. [^*]*\*\* )", "", paragraph))
        assert paragraph.startswith("|") or len(sentences) <= 4, paragraph


NUMBERS = {
    "at most 390 texts, and 20,000 characters in all": (module.MAX_EXAMPLES, module.EXAMPLE_CHARACTERS),
    "A batch is closed early when its texts reach 60,000 characters": (module.BATCH_CHARACTERS,),
    "half a second, doubled up to a minute": (0.5, module.Timing().longest_backoff / 60),
    "A wait of over an hour": (module.Timing().longest_wait / 3600,),
    "What fails three times while other calls succeed": (module.MAX_TRIES_ALONE,),
    "until two failures are alike, four times at most": (module.MAX_LONE_ALIKE, module.MAX_LONE_FAILURES),
    "or 20 in a row": (module.MAX_REFUSALS,),
    "in at most 16 calls": (module.MAX_PROBE_CALLS,),
    "or is larger than 8 MB": (module.REPLY_BYTES / 1e6,),
    "the call ends after ten minutes, or at 8 MB": (module.Timing().call / 60, module.REPLY_BYTES / 1e6),
    "those in flight are waited for, 8 seconds": (module.Timing().stop,),
    "after three jobs it stays blank": (module.MAX_JOBS,),
    "each of its six most frequent values": (module.SHOWN_GROUPS,),
}
WORDS = {
    "half a second": 0.5, "a minute": 1, "an hour": 1, "two": 2, "three": 3, "four": 4, "six": 6, "ten": 10,
}  # fmt: skip


@pytest.mark.parametrize("phrase", NUMBERS)
def test_a_number_of_the_readme_is_the_modules(phrase: str) -> None:
    assert phrase in README
    written = re.findall(r"[\d,]*\d|" + "|".join(WORDS), phrase)
    assert [WORDS.get(word) or float(word.replace(",", "")) for word in written] == list(NUMBERS[phrase])


def test_a_server_that_was_never_reached_is_given_up_within_30_seconds_at_the_longest_waits() -> None:
    timing = module.Timing(jitter=lambda: 1.25)
    waited, failures = 0.0, 0
    while waited <= timing.unreachable:
        failures += 1
        waited += timing.backoff(failures) + 5.0  # of connecting
    assert waited < 30


def test_the_flag_table_is_the_parsers() -> None:
    parser = module.build_parser()
    actions = {action.option_strings[-1]: action for action in parser._actions}
    rows = {flag: (parameter, default) for _, flag, parameter, default, _ in table("Flags")}
    texts = {flag: text for _, flag, _, _, text in table("Flags")}
    assert sorted(rows) == sorted(actions)
    named = [group for group, *_ in table("Flags") if group]
    grouped = [str(group.title) for group in parser._action_groups if group._group_actions]
    assert named == [*grouped[1:], grouped[0]]
    shown = [action.option_strings[-1] for group in parser._action_groups[2:] for action in group._group_actions]
    assert [flag for flag in rows if flag in shown] == shown
    parameters = inspect.signature(module.enrich_dataset).parameters
    for flag, (parameter, default) in rows.items():
        action = actions[flag]
        assert parameter == (action.dest if action.dest in parameters else "")
        if parameter:
            assert texts[flag] == module.OPTIONS[parameter].metadata["help"]
        value = parser.get_default(action.dest)
        if parameter == "model":
            before, day, after = module.DEFAULT_MODELS
            value = f"{before}`, from {day} on `{after}"
        assert default == ("" if value is None or value is argparse.SUPPRESS else str(value))
    assert {parameter for parameter, _ in rows.values()} - {""} == set(parameters)


def test_the_exit_codes_are_the_modules() -> None:
    told = re.findall(r"(\d+) [a-z]", (module.__doc__ or "").partition("Exit codes:")[2].partition("\n\n")[0])
    line = README.partition("\nExit codes:")[2].partition("\n")[0]
    assert re.findall(r"(?:^|;) (\d+) ", line) == told == ["0", "1", "2", "3", "130"]


def without_times(text: str) -> str:
    text = re.sub(r"\[\d\d:\d\d<.*?\]", "[]", text)
    return re.sub(r"~[\d.]+x", "~x", text)


def test_the_tour_prints_what_the_readme_shows(tmp_path: Path) -> None:
    block = README.partition("```console\n$ ")[2].partition("\n```")[0]
    command, _, shown = block.partition("\n")
    shutil.copy(ROOT / "HatefulData.csv", tmp_path)
    shutil.copy(ROOT / "enrich_dataset.py", tmp_path)
    with StandIn(first_token=0.4, per_token=0.012) as server:
        words = shlex.split(command.replace("http://127.0.0.1:8000/v1", server.url))
        assert words[0] == "python"
        run = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=True)
    bar = "\n".join(run.stderr.splitlines()[1:])
    printed = run.stdout.replace("\n\n\n", f"\n\n{bar}\n\n").strip()
    assert without_times(printed) == without_times(shown)


def test_the_dry_run_prints_what_the_readme_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _, shown = README.split("```console\n$ ")[2].partition("\n```")[0].partition("\n")
    monkeypatch.chdir(ROOT)
    command, _, lines = command.partition(" | tail -")
    assert module.main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.splitlines()[-int(lines) :] == shown.splitlines()


def test_the_batch_api_command_works(tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"`(python enrich_dataset.py [^`]* --batch-api)`", README)
    shutil.copy(ROOT / "HatefulData.csv", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert module.main([*shlex.split(command)[2:], "--quiet"]) == 0
    assert {call.job for call in server.calls if call.texts != (module.HARMLESS,)} == {"batch_1"}


def test_the_code_for_dask_works(tmp_path: Path, server: StandIn) -> None:
    code = README.partition("```python\nimport dask")[2].partition("```")[0]
    (tmp_path / "on_dask.py").write_text("import dask" + code)
    for name in ("enrich_dataset.py", "HatefulData.csv"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"OPENAI_BASE_URL": server.url, "DASK_DISTRIBUTED__SCHEDULER__DASHBOARD__ENABLED": "0"}
    run = subprocess.run(
        [sys.executable, "on_dask.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(r"racist +\d\nsexist +\d", run.stdout)
    assert (tmp_path / "answers-0.sqlite3").exists()
    assert len([text for call in server.calls for text in call.texts]) == 37


def test_the_query_of_the_store_works(tmp_path: Path, server: StandIn) -> None:
    import sqlite3

    module.enrich_dataset(
        ROOT / "HatefulData.csv", tmp_path / "out.csv", "text", "label", ["a label"], base_url=server.url, quiet=True
    )
    (query,) = re.findall(r'sqlite3 "(SELECT [^"]*)"', README.replace("HatefulData_enriched.csv.answers.", ""))
    with sqlite3.connect(tmp_path / "out.csv.answers.sqlite3") as db:
        calls, prompt, completion = db.execute(query).fetchone()
    assert calls == len(server.calls) == 4
    assert prompt == sum(call.prompt_tokens for call in server.calls)
    assert completion == sum(call.completion_tokens for call in server.calls)


def test_the_example_works_without_a_key_and_asks_nothing_when_it_is_run_again(tmp_path: Path) -> None:
    for name in ("example_usage.py", "enrich_dataset.py", "HatefulData.csv"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    for path in (*(ROOT / "tests").glob("stand_in_*.py"), ROOT / "tests" / "local_model.py"):
        shutil.copy(path, tmp_path / "tests")
    code = "import importlib.util as u, runpy\nfind = u.find_spec\n"  # as if the local model were not installed
    code += "u.find_spec = lambda name, *more: None if name == 'xllamacpp' else find(name, *more)\n"
    code += "runpy.run_path('example_usage.py', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("No OPENAI_API_KEY is set, so no model is asked.\n")
    assert "word rule" in run.stdout
    assert "psychological_attacks: 3/38 (7.9%)\n" in run.stdout
    assert "Total API calls made: 4 " in run.stdout
    again = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Nothing to send: no API call is made" in again.stdout
    assert (tmp_path / "HatefulData_stand_in_enriched.csv").exists()


def test_the_example_asks_the_server_when_there_is_a_key(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("example_usage.py", "enrich_dataset.py", "HatefulData.csv"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    subprocess.run([sys.executable, "example_usage.py"], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "HatefulData_enriched.csv").exists()
    assert len(server.calls) == 4


def test_the_sample_is_what_it_should_be() -> None:
    import pandas as pd

    sample = pd.read_csv(ROOT / "HatefulData.csv")
    assert list(sample.columns) == ["id", "text", "label"]
    assert len(sample) == 38
    assert set(sample["label"]) == {"hate", "nothate"}
    assert sample["text"].duplicated().sum() == 1
    for sign in (",", '"', "\n", "👊"):
        assert sample["text"].str.contains(sign, regex=False).any()


def test_the_stand_in_runs_by_hand() -> None:
    import json
    from urllib.request import urlopen

    command = [sys.executable, str(ROOT / "tests" / "stand_in_server.py"), "--port", "0", "--fault", "500=0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().split()[3]
        with urlopen(f"{url}/models/gpt-4o-mini") as reply:
            assert json.load(reply)["shutdown_date"] == "2027-01-14"
        with urlopen(url.replace("/v1", "/stand-in/calls")) as reply:
            assert json.load(reply)["calls"] == 0
        process.terminate()
