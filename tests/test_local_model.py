"""The whole program with a real language model, on this machine. Nothing is assumed about what it thinks."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import local_model
import pandas as pd
import pytest
from conftest import ROOT, read_cells, write_texts

import enrich_dataset as module

pytestmark = pytest.mark.skipif(not local_model.is_installed(), reason=local_model.INSTALL)

LABELS = ["threat", "praise"]
TEXTS = [
    "I will find you and you will regret it.", "What a lovely cake, thank you!", "The tram leaves at nine.",
    "You did this so well, congratulations.", "Watch your back from now on.", "It rained all day in Bergen.",
]  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with local_model.local_model() as url:
        yield url


def enrich(folder: Path, url: str, texts: list[str] = TEXTS, **options: Any) -> dict[str, Any]:
    path = write_texts(folder / "in.csv", texts)
    options = {"batch_size": 3, "max_workers": 2, "model": "smollm2", "quiet": True} | options
    frame = module.enrich_dataset(path, folder / "out.csv", "text", None, LABELS, base_url=url, **options)
    return dict(frame.attrs["enrichment"])


def labelled(folder: Path) -> list[list[str]]:
    return read_cells(folder / "out.csv", LABELS)


@pytest.mark.parametrize("form", ["list", "each", "one"])
def test_every_row_is_labelled_and_a_second_run_asks_nothing(tmp_path: Path, url: str, form: str) -> None:
    assert enrich(tmp_path, url, answer_form=form)["calls"] == 2
    cells = labelled(tmp_path)
    assert {cell for row in cells for cell in row} <= {"0", "1"}
    assert form != "one" or {row.count("1") for row in cells} == {1}
    assert enrich(tmp_path, url, answer_form=form)["calls"] == 0
    assert labelled(tmp_path) == cells


def command(folder: Path, url: str, texts: list[str]) -> subprocess.Popen[str]:
    path = write_texts(folder / "in.csv", texts)
    arguments = [
        "--input",
        str(path),
        "--output",
        str(folder / "out.csv"),
        "--text-column",
        "text",
        "--labels",
        *LABELS,
    ]
    arguments += ["--batch-size", "2", "--max-workers", "1", "--base-url", url, "--model", "smollm2"]
    program = [sys.executable, str(ROOT / "enrich_dataset.py"), *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_answers(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the store has grown by a first answer."""
    log = folder / "out.csv.answers.sqlite3-wal"
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.stat().st_size > 40_000:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_resumes(tmp_path: Path, url: str, number: signal.Signals) -> None:
    texts = [f"{text} ({number})" for number in range(2) for text in TEXTS]
    process = command(tmp_path, url, texts)
    wait_for_answers(tmp_path, process)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode in {-signal.SIGKILL, 130, 0}
    calls = enrich(tmp_path, url, texts, batch_size=2)["calls"]
    assert calls <= 6
    assert all(cell in {"0", "1"} for row in labelled(tmp_path) for cell in row)


def test_a_context_too_small_for_ten_rows_labels_each_row_that_fits_alone(tmp_path: Path) -> None:
    with local_model.local_model(slots=1, context=384) as small:
        texts = [f"{text} It was on day {number} of a long journey." for number, text in enumerate(TEXTS)]
        told = enrich(tmp_path, small, [*texts, "cake " * 600], batch_size=10)
    assert told["blank_rows"] == {6: "too long for the model or the rate limit"}
    assert all(cell in {"0", "1"} for row in labelled(tmp_path)[:6] for cell in row)
    assert told["calls"] > 2


def test_the_audit_and_the_comparison_with_people_have_finite_figures(tmp_path: Path, url: str) -> None:
    gold = pd.DataFrame({"text": TEXTS, "threat": [1, 0, 0, 0, 1, 0], "praise": [0, 1, 0, 1, 0, 0]})
    told = enrich(tmp_path, url, audit=3, gold=gold)
    for label in LABELS:
        assert math.isfinite(told["audit"][label]["agreement"])
        assert told["audit"][label]["rows"] == 3
        assert math.isfinite(told["gold"][label]["accuracy"])


def without_figures(text: str) -> list[str]:
    """A report's lines without what a model thinks: the first word of a table's rows, other lines whole."""
    return [re.sub(r" {2,}.*", "", line) for line in text.splitlines()]


def test_the_tables_of_quality_are_like_the_readme_shows(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "ENRICHMENT_README.md").read_text(encoding="utf-8")
    command, _, shown = readme.split("```console\n$ ")[3].partition("\n```")[0].partition("\n")
    (tmp_path / "HatefulData.csv").write_bytes((ROOT / "HatefulData.csv").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert module.main(shlex.split(command.replace("http://127.0.0.1:34335/v1", url))[2:]) == 0
    printed = capsys.readouterr().out.partition("=== Audit")[2].partition("\n\n")[0].strip()
    assert without_figures(printed) == without_figures(shown.partition("=== Audit")[2].strip())
    assert (tmp_path / "labels.png").exists()


def test_the_example_asks_it_and_its_server_ends_with_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    code = "import sys; sys.path[:0] = [sys.argv[1]]; import example_usage as e; from pathlib import Path\n"
    code += "e.HERE = Path(sys.argv[2]); e.LABELS = e.LABELS[:2]; e.main()"
    for name in ("tests", "HatefulData.csv"):
        (tmp_path / name).symlink_to(ROOT / name)
    run = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "answers, on this machine: real inference, but a toy-size model, so poor labels" in run.stdout
    assert "✓ Enrichment complete!" in run.stdout
    assert (tmp_path / "HatefulData_local_enriched.csv").exists()
