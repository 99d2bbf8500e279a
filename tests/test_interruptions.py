"""Ctrl-C, SIGTERM and SIGKILL: what came back is kept, and the same command goes on."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest
from conftest import Bench, make_texts

pytestmark = pytest.mark.every_form


def wait_for_calls(bench: Bench, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(bench.server.calls) < count and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_came_back_and_goes_on(bench: Bench, number: signal.Signals) -> None:
    bench.server.model.first_token = 0.5
    process = bench.write(make_texts(300)).process()
    wait_for_calls(bench, 5)
    process.send_signal(number)
    stopped = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Stopping: calls in flight: " in errors
    assert max(call.at for call in bench.server.calls) < stopped + 0.4  # a call may just be leaving
    labelled = sum(cells != [""] * 3 for cells in bench.cells)
    assert labelled == 10 * len(bench.server.calls)
    assert f"Stopped: {labelled} of 300 rows are labelled and saved" in errors
    assert "The same command resumes from here." in errors
    assert "Traceback" not in errors
    bench.server.model.first_token = 0.0
    assert bench.process().wait(30) == 0
    assert sorted(bench.asked) == sorted(bench.texts)
    bench.check()


def test_a_second_ctrl_c_leaves_at_once(bench: Bench) -> None:
    bench.server.model.first_token = 20
    process = bench.write(make_texts(30)).process()
    bench.wait_in_flight(3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - started < 3
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_killed_at_random_moments_and_finished_is_as_unbroken(bench: Bench) -> None:
    workers, kills, dice = 4, 6, random.Random(1)
    bench.server.model.first_token = 0.03
    bench.write(make_texts(600))
    for _ in range(kills):
        process = bench.process("--max-workers", str(workers), "--quiet")
        known = len(bench.server.calls)
        wait_for_calls(bench, known + dice.randint(1, 8))
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
        assert not bench.output.exists()
    bench.server.model.first_token = 0.0
    assert bench.process().wait(60) == 0
    bench.check()
    again = Counter(bench.asked)
    assert sum(count - 1 for count in again.values()) <= kills * workers * 10
    assert max(again.values()) <= 1 + kills


def test_a_killed_run_leaves_the_earlier_csv_whole(bench: Bench) -> None:
    bench.write(make_texts(20)).enrich(limit=10)
    before = bench.output.read_bytes()
    bench.server.model.first_token = 5
    process = bench.process()
    bench.wait_in_flight()
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    process.communicate()
    assert bench.output.read_bytes() == before


@pytest.mark.one_form
def test_a_reader_of_the_report_that_goes_away_does_not_end_the_job(bench: Bench) -> None:
    bench.server.model.first_token = 0.3
    process = bench.write(make_texts(30)).process()
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=30)
    bench.check()
