"""Ctrl-C, SIGTERM and SIGKILL: what came back is kept, and the same command goes on."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest
from conftest import Job, make_texts

pytestmark = pytest.mark.every_form


def wait_for_calls(job: Job, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(job.server.calls) < count and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_came_back_and_goes_on(job: Job, number: signal.Signals) -> None:
    job.server.first_token = 0.5
    process = job.write(make_texts(300)).process()
    wait_for_calls(job, 5)
    process.send_signal(number)
    stopped = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Stopping: calls in flight: " in errors
    assert max(call.at for call in job.server.calls) < stopped + 0.4  # a call may just be leaving
    labelled = sum(cells != [""] * 3 for cells in job.cells)
    assert labelled == 10 * len(job.server.calls)
    assert f"Stopped: {labelled} of 300 rows are labelled and saved" in errors
    assert "The same command resumes from here." in errors
    assert "Traceback" not in errors
    job.server.first_token = 0.0
    assert job.process().wait(30) == 0
    assert sorted(job.asked) == sorted(job.texts)
    job.check()


def test_a_second_ctrl_c_leaves_at_once(job: Job) -> None:
    job.server.first_token = 20
    process = job.write(make_texts(30)).process()
    job.wait_in_flight(3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - started < 3
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_killed_at_random_moments_and_finished_is_as_unbroken(job: Job) -> None:
    workers, kills, dice = 4, 6, random.Random(1)
    job.server.first_token = 0.03
    job.write(make_texts(600))
    for _ in range(kills):
        process = job.process("--max-workers", str(workers), "--quiet")
        known = len(job.server.calls)
        wait_for_calls(job, known + dice.randint(1, 8))
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
        assert not job.output.exists()
    job.server.first_token = 0.0
    assert job.process().wait(60) == 0
    job.check()
    again = Counter(job.asked)
    assert sum(count - 1 for count in again.values()) <= kills * workers * 10
    assert max(again.values()) <= 1 + kills


def test_a_killed_run_leaves_the_earlier_csv_whole(job: Job) -> None:
    job.write(make_texts(20)).enrich(limit=10)
    before = job.output.read_bytes()
    job.server.first_token = 5
    process = job.process()
    job.wait_in_flight()
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    process.communicate()
    assert job.output.read_bytes() == before


@pytest.mark.one_form
def test_a_reader_of_the_report_that_goes_away_does_not_end_the_job(job: Job) -> None:
    job.server.first_token = 0.3
    process = job.write(make_texts(30)).process()
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=30)
    job.check()
