"""Console: what is printed, where, and in which signs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, Bench, make_texts


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
