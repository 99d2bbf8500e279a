"""Sending: faults are retried, useless runs stopped, the probe finds what a server takes, and stops are clean."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import FAST, LABELS, ROOT, Bench, make_texts, price
from stand_in_model import FAULTS
from stand_in_rules import error_body

import enrich_dataset as module


@pytest.mark.parametrize("skew", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_nothing(bench: Bench, skew: float) -> None:
    bench.server.script.append((429, {"retry-after": formatdate(time.time() + 1, usegmt=True)}, {}))
    bench.timing = module.Timing(utc_now=lambda: datetime.now(UTC) + timedelta(seconds=skew * len(bench.server.calls)))
    bench.write(make_texts(40)).enrich()
    bench.check()


class TestUselessModels:
    @pytest.mark.parametrize("workers", [3, 200])
    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("garbage", "the answer was not valid JSON"),
            ("refusal", "the model refused to answer"),
            ("strange-ids", "its id was missing from the answer, or repeated"),
        ],
    )
    def test_a_model_none_of_whose_answers_can_be_used_ends_the_run_soon(
        self, bench: Bench, fault: str, kind: str, workers: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.faults.shares, bench.server.model.first_token = {fault: 1.0}, 0.02
        assert bench.write(make_texts(3000)).command("--max-workers", str(workers), "--max-cost", "1") == 1
        assert len(bench.server.calls) <= 60
        assert bench.server.most_in_flight <= 20
        errors = capsys.readouterr().err
        assert (
            f"gives no answer that can be used, not even about a harmless text: {kind}. Try another --model" in errors
        )

    def test_a_useless_model_ends_a_run_of_jobs_before_the_first_job(self, bench: Bench) -> None:
        bench.server.faults.shares, bench.spares_probes = {"garbage": 1.0}, False
        with pytest.raises(module.ProviderError, match="can be used"):
            bench.write(make_texts(300)).enrich(use_batch_api=True, poll_interval=0.05)
        assert not bench.server.batches.jobs

    def test_a_healthy_run_still_isolates_each_poisoned_row(self, bench: Bench) -> None:
        texts = make_texts(1000)
        poisoned = range(50, 1000, 100)
        for number in poisoned:
            texts[number] += " poison-refusal"
        bench.write(texts).enrich(max_workers=8)
        bench.check(blank_rows=poisoned)
        assert len(bench.server.calls) < 100 + 10 * 12


class TestCalls:
    """By a clock of the test's own: nothing here waits."""

    def test_a_call_is_given_up_after_its_longest_time_and_comes_back_as_one_without_an_answer(self) -> None:
        now = [0.0]
        gate = threading.Event()
        with module.Calls(1, 5.0, module.Timing(clock=lambda: now[0], call=600.0)) as calls:
            made = calls.start(lambda: gate.wait(20) and module.Reply(200, {}, {}, 0.0))
            now[0] = 599.0
            assert calls.wait_for_one(0.0, is_stopping=False) is None
            now[0] = 601.0
            returned, reply = calls.wait_for_one(0.0, is_stopping=False)
            assert returned is made
            assert (reply.status, reply.reason) == (0, "no whole answer in time")
            gate.set()

    @pytest.mark.parametrize(("slowest", "longest"), [(0.0, 8.0), (30.0, 30.0)])
    def test_a_stop_waits_eight_seconds_or_as_long_as_the_slowest_answer_took(
        self, slowest: float, longest: float
    ) -> None:
        now = [100.0]
        gate = threading.Event()
        with module.Calls(1, 5.0, module.Timing(clock=lambda: now[0])) as calls:
            calls.slowest = slowest
            calls.start(lambda: gate.wait(20) and module.Reply(200, {}, {}, 0.0))
            assert calls.wait_for_one(0.0, is_stopping=True) is None
            now[0] += longest - 0.1
            assert calls.wait_for_one(0.0, is_stopping=True) is None
            now[0] += 0.2
            assert calls.wait_for_one(0.0, is_stopping=True) is not None
            gate.set()


class TestSlowReplies:
    @pytest.mark.usefixtures("soon")
    @pytest.mark.parametrize("fault", ["drip-body", "drip-header", "drip-blanks"])
    def test_a_call_that_drips_has_an_end_and_is_retried(self, bench: Bench, fault: str) -> None:
        bench.server.faults.shares = {fault: 0.3}
        started = time.monotonic()
        bench.write(make_texts(60)).enrich(timeout=2.5)  # the bytes come a second apart
        bench.check()
        assert time.monotonic() - started < 30

    @pytest.mark.parametrize(
        ("fault", "more"), [("drip-header", ()), ("drip-body", ()), ("drip-blanks", ("--batch-api",))]
    )
    def test_ctrl_c_ends_it_all_the_same_with_the_csv_written(
        self, bench: Bench, fault: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(60)).enrich(limit=20)
        bench.timing = module.Timing(stop=0.5)
        bench.server.faults.shares = {fault: 1.0}
        bench.server.faults.drips_everywhere = fault if more else ""
        interrupt = threading.Thread(target=lambda: (bench.wait_in_flight(), os.kill(os.getpid(), signal.SIGINT)))
        interrupt.start()
        assert bench.command(*more) == 130
        interrupt.join()
        assert "Stopped: 20 of 60 rows are labelled and saved" in capsys.readouterr().err
        bench.check(blank_rows=range(20, 60))

    @pytest.mark.parametrize(
        "headers",
        [
            {"retry-after": "1e9"}, {"retry-after-ms": "1e13"}, {"retry-after": "3700"},
            {"retry-after": "Thu, 01 Jan 2099 00:00:00 GMT"},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("status", [429, 503])
    def test_a_wait_of_more_than_an_hour_ends_the_run(
        self, bench: Bench, headers: dict[str, str], status: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.script.extend([None, (status, headers, error_body("wait"))])
        assert bench.write(make_texts(30)).command("--max-workers", "1") == 1
        errors = capsys.readouterr().err
        assert re.search(r" asks to wait( until [\d:-]+)? \((1 h 2 min|[\d,]+ days)\); answers so far are kept", errors)
        assert "all workers wait" not in errors
        bench.check(blank_rows=range(10, 30))

    @pytest.mark.parametrize("wait", ["1e12", "Fri, 31 Dec 9999 23:59:59 GMT"])
    def test_a_wait_that_ends_after_the_last_of_all_dates_ends_the_run(
        self, bench: Bench, wait: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.script.extend([None, (429, {"retry-after": wait}, error_body("wait"))])
        assert bench.write(make_texts(30)).command("--max-workers", "1") == 1
        assert re.search(
            r" asks to wait( until 9999-12-31)? \([\d,]+ days\); answers so far are kept", capsys.readouterr().err
        )
        bench.check(blank_rows=range(10, 30))

    @pytest.mark.parametrize(
        "headers",
        [
            {"retry-after": "inf"}, {"retry-after": "1e400"}, {"retry-after": "nan"}, {"retry-after": "soon"},
            {"retry-after": "Fri, 31 Dec 9999 23:59:59 +2400"}, {"retry-after": "Fri, 31 Dec 99999999999 23:59:59 GMT"},
            {"retry-after-ms": "inf"}, {"retry-after-ms": "nan"},
        ],
    )  # fmt: skip
    def test_what_is_no_wait_is_taken_as_absent_in_either_header(self, bench: Bench, headers: dict[str, str]) -> None:
        bench.server.script.extend([(429, headers, error_body("wait"))] * 2)
        bench.write(make_texts(30)).enrich()
        bench.check()

    def test_an_hour_of_nothing_but_refusals_ends_the_run(self, bench: Bench) -> None:
        bench.timing = module.Timing(longest_wait=1.0)
        bench.server.faults.shares = {"429": 1.0}
        with pytest.raises(module.ProviderError, match="has answered nothing but HTTP 429 for an hour"):
            bench.write(make_texts(30)).enrich()

    def test_the_wait_for_a_job_has_an_end_too(self, bench: Bench) -> None:
        bench.server.script.append((429, {"retry-after": "9000"}, error_body("wait")))
        with pytest.raises(module.ProviderError, match=r"asks to wait until \d\d:\d\d \(2 h 30 min\)"):
            bench.write(make_texts(30)).enrich(**FAST)

    def test_the_bar_shows_what_it_waits_for_and_how_long(self, bench: Bench) -> None:
        bench.server.script.append((429, {"retry-after": "3"}, error_body("slow down")))
        leader, follower = os.openpty()
        termios.tcsetwinsize(follower, (24, 120))
        program = [sys.executable, str(ROOT / "enrich_dataset.py")]
        arguments = bench.write(make_texts(10)).arguments("--base-url", bench.server.url)
        process = subprocess.Popen([*program, *arguments], stdout=subprocess.DEVNULL, stderr=follower)
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(leader, 4096):
                shown += piece
        os.close(leader)
        assert process.wait(30) == 0
        assert re.search(rb"rate limit, waiting [123] s", shown)


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


def test_a_reader_of_the_report_that_goes_away_does_not_end_the_job(bench: Bench) -> None:
    bench.server.model.first_token = 0.3
    process = bench.write(make_texts(30)).process()
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=30)
    bench.check()


def test_a_row_that_failed_is_pending_at_the_next_run(bench: Bench) -> None:
    bench.write(["cake", "poison-garbage"])
    assert bench.command("--quiet") == 3
    before = len(bench.server.calls)
    assert bench.command("--quiet") == 3
    # Nothing has been answered in this run, so that a harmless text is asked whether the server works at all.
    assert [call.texts for call in bench.server.calls[before:]] == [("poison-garbage",), (module.HARMLESS,)]


TRANSPORT_FAULTS = ["500", "503", "reset", "cut", "html", "empty"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
def test_a_fault_on_the_way_is_retried(bench: Bench, fault: str) -> None:
    bench.server.faults.shares = {fault: 0.3}
    bench.write(make_texts(60)).enrich(batch_size=3)
    bench.check()
    assert any(call.fault == fault for call in bench.server.calls)


@pytest.mark.usefixtures("quick")
@pytest.mark.every_form
def test_a_storm_of_all_faults_leaves_right_cells_and_only_the_poisoned_rows_blank(bench: Bench) -> None:

    bench.server.faults.shares = dict.fromkeys(FAULTS, 0.02)
    texts = make_texts(400)
    texts[7], texts[205], texts[399] = "poison-filter", "poison-refusal", "poison-garbage"
    assert bench.write(texts).command("--quiet", "--max-workers", "8") == 3
    bench.check(blank_rows=[7, 205, 399])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
def test_a_row_on_which_the_server_always_fails_is_given_up_alone(bench: Bench, fault: str) -> None:
    texts = make_texts(60)
    texts[5] = f"poison-{fault}"
    frame = bench.write(texts).enrich(max_retries=2, batch_size=3)
    bench.check(blank_rows=[5])
    reasons = {"html": "no completion in the reply", "empty": "no completion in the reply"}
    assert reasons.get(fault, "the server failed 3 times on this request") in frame.attrs["enrichment"]["blank_rows"][5]
    assert sum("poison" in text for text in bench.asked) <= 3 + 1 + 2


@pytest.mark.usefixtures("quick")
def test_a_timeout_is_retried(bench: Bench) -> None:
    bench.server.model.first_token = 0.5
    with pytest.raises(module.ProviderError, match="no answer in time"):
        bench.write(["cake"]).enrich(timeout=0.1, max_retries=4)
    assert bench.server.arrived == 5 + 5  # and the probe's
    bench.server.model.first_token = 0.0
    bench.enrich(timeout=5)
    bench.check()


class TestProbe:
    """What a server takes is found out with one harmless text, never by guessing from its words alone."""

    UNKNOWN = (400, {}, error_body("Something is wrong with your request"))

    def probed(self, bench: Bench) -> list[Any]:
        return [call for call in bench.server.calls if call.texts == (module.HARMLESS,)]

    @pytest.mark.parametrize("status", [400, 403, 422])
    def test_a_refusal_before_anything_was_answered_is_settled_by_one_call(self, bench: Bench, status: int) -> None:
        bench.server.script.append((status, {}, error_body("no reason that anybody knows")))
        bench.write(make_texts(30)).enrich(max_workers=1)
        bench.check()
        assert len(self.probed(bench)) == 1
        assert len(bench.server.calls) == 1 + 1 + 2 + 2

    @pytest.mark.parametrize(
        ("refused", "lost"),
        [
            ({"json_schema"}, "json_schema"),
            ({"json_schema", "json_object"}, "response_format"),
            ({"temperature", "json_schema"}, "temperature"),
            ({"max_completion_tokens"}, "max_completion_tokens"),
        ],
    )
    def test_a_parameter_refused_in_words_that_nobody_foresaw_is_found(
        self, bench: Bench, refused: set[str], lost: str
    ) -> None:
        bench.server.gate.words = lambda part: error_body("Request contains an invalid argument.")
        bench.server.gate.refuses = refused
        bench.write(make_texts(60)).enrich(max_workers=1)
        bench.check()
        last = json.dumps(bench.server.calls[-1].body)
        assert f'"{lost}"' not in last
        assert len(self.probed(bench)) <= 16
        bench.server.calls.clear()
        bench.write(make_texts(80)).enrich()  # the store has what was found
        assert {call.status for call in bench.server.calls} == {200}

    def test_a_healthy_server_gets_no_probe(self, bench: Bench) -> None:
        bench.write(make_texts(60)).enrich()
        assert self.probed(bench) == []

    @pytest.mark.usefixtures("quick")
    def test_an_outage_at_the_start_is_waited_for_and_costs_no_form(self, bench: Bench) -> None:
        bench.server.script.extend([(503, {}, error_body("overloaded"))] * 8)
        bench.write(make_texts(60)).enrich()
        bench.check()
        assert bench.server.calls[-1].body["response_format"]["type"] == "json_schema"
        assert bench.server.calls[-1].body["temperature"] == 0

    @pytest.mark.usefixtures("quick")
    def test_a_5xx_that_follows_a_parameter_is_found_too(self, bench: Bench) -> None:
        bench.server.gate.refuses = {"json_schema"}
        bench.server.gate.status = 500
        bench.write(make_texts(30)).enrich(max_workers=1)
        bench.check()
        assert bench.server.calls[-1].body["response_format"] == {"type": "json_object"}

    def test_an_account_that_is_blocked_in_the_middle_ends_the_run(self, bench: Bench) -> None:
        bench.write(make_texts(400))
        bench.server.script.extend([None] * 3 + [(403, {}, error_body("Your account was blocked."))] * 500)
        with pytest.raises(module.ProviderError, match=r"Every request is refused .*Your account was blocked"):
            bench.enrich()
        assert len(bench.server.calls) <= 3 + module.MAX_REFUSALS + 3 + 16

    def test_what_the_labels_are_at_fault_for_is_said(self, bench: Bench) -> None:
        bench.server.gate.banned = "praising_violence"
        with pytest.raises(module.ProviderError, match="It answers without your labels and instructions"):
            bench.write(make_texts(30)).enrich()

    def test_an_error_in_no_form_that_is_known_is_quoted_too(self, bench: Bench) -> None:
        """As MiniMax has it."""
        body = {"id": "x", "choices": None, "base_resp": {"status_code": 1008, "status_msg": "no such plan"}}
        bench.server.script.extend([(200, {}, body)] * 100)
        with pytest.raises(module.ProviderError, match=r"no answer that can be used.*Server message: .*no such plan"):
            bench.write(make_texts(30)).enrich()

    @pytest.mark.usefixtures("quick")
    def test_a_server_that_fails_from_the_start_is_quoted(self, bench: Bench) -> None:
        bench.server.script.extend([(503, {}, error_body("Model is loading"))] * 500)
        with pytest.raises(module.ProviderError, match=r"fails every request \(HTTP 503\).* Model is loading"):
            bench.write(make_texts(30)).enrich()

    @pytest.mark.usefixtures("quick")
    def test_a_row_that_failed_in_an_outage_is_asked_again_after_it(self, bench: Bench) -> None:
        """With no other row answered meanwhile, it is not the row's fault."""
        bench.server.script.extend([None] + [(503, {}, error_body("down"))] * 9)
        frame = bench.write(make_texts(5)).enrich(batch_size=1, max_workers=1, max_retries=2)
        assert frame.attrs["enrichment"]["blank_rows"] == {}
        bench.check()

    def test_sixty_503s_at_the_start_are_outlasted_with_sixty_retries(self, bench: Bench) -> None:
        bench.timing = module.Timing(longest_backoff=0.01)
        bench.server.script.extend([(503, {}, error_body("down"))] * 60)
        bench.write(make_texts(5)).enrich(max_retries=60)
        bench.check()

    @pytest.mark.usefixtures("quick")
    def test_a_lost_connection_does_not_end_it(self, bench: Bench) -> None:
        def lose_the_second(number: int, body: Any) -> None:
            bench.server.faults.shares = {"reset": 1.0} if number == 1 else {}

        bench.server.script.append(self.UNKNOWN)
        bench.server.on_call = lose_the_second
        bench.write(make_texts(5)).enrich()
        bench.check()
        assert [call.fault for call in self.probed(bench)] == ["reset", ""]

    def test_its_wait_for_a_rate_limit_has_an_end(self, bench: Bench) -> None:
        bench.timing = module.Timing(longest_wait=1.0)
        bench.server.script.extend([self.UNKNOWN, *[(429, {"retry-after-ms": "20"}, error_body("slow"))] * 2000])
        with pytest.raises(module.ProviderError, match="nothing but HTTP 429 for an hour"):
            bench.write(make_texts(5)).enrich(max_workers=1)

    @pytest.mark.usefixtures("quick")
    def test_an_outage_is_not_fired_through(self, bench: Bench) -> None:
        bench.write(make_texts(300))
        bench.server.script.extend([None] * 3 + [(503, {}, error_body("down"))] * 5000)
        with pytest.raises(module.ProviderError, match="fails every request"):
            bench.enrich(batch_size=1, max_retries=3)
        asked = {call.texts for call in bench.server.calls if call.texts != (module.HARMLESS,)}
        assert len(asked) <= 3 + 3 * 5

    def test_it_counts_in_calls_and_cost_and_is_named_beside_them(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.script.append(self.UNKNOWN)
        told = bench.write(make_texts(30)).enrich(quiet=False, max_workers=1).attrs["enrichment"]
        assert "Total API calls made: 6, 1 of them about a harmless text" in capsys.readouterr().out
        assert told["calls"] == len(bench.server.calls)
        assert told["cost"] == pytest.approx(price(bench.server.calls))


class TestGivenUp:
    """A row that was given up because of its text is kept as that, and asked last, alone and once by the next run."""

    def filtered(self, count: int) -> list[str]:
        return [
            f"{text} poison-400-filter" if number % 5 == 0 else text for number, text in enumerate(make_texts(count))
        ]

    def test_the_next_run_sends_it_last_alone_and_once_and_says_so(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(self.filtered(20)).enrich()
        bench.server.calls.clear()
        bench.write([*self.filtered(20), *(f"{text}!" for text in make_texts(20))])
        assert bench.command("--max-workers", "1") == 3
        assert "Rows given up by an earlier run (sent last, alone and once): 4\n" in capsys.readouterr().out
        assert [len(call.texts) for call in bench.server.calls[-4:]] == [1] * 4
        assert [call.texts for call in bench.server.calls].count((module.HARMLESS,)) == 0
        assert len(bench.server.calls) == 2 + 4
        bench.check(blank_rows=[0, 5, 10, 15])

    def test_a_run_in_which_only_such_rows_are_left_ends_with_3_and_all_that_belongs_to_it(self, bench: Bench) -> None:
        texts = self.filtered(150)
        bench.write(texts).enrich(max_workers=8)
        gold = bench.input.with_name("gold.csv")
        gold.write_text(f'text,{LABELS[0]}\n"{texts[1]}",1\n')
        bench.server.calls.clear()
        assert bench.command("--gold", str(gold), "--sample", "5") == 3
        asked = [call.texts for call in bench.server.calls if call.texts != (module.HARMLESS,)]
        assert len(asked) == len(set(asked)) == 30
        assert Path(f"{bench.output}.sample.csv").exists()
        assert json.loads(Path(f"{bench.output}.run.json").read_text())["gold"]
        bench.check(blank_rows=range(0, 150, 5))

    def test_the_reason_of_blank_rows_is_printed_once_in_the_servers_words(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(self.filtered(20)).command() == 3
        line = "A row is left blank: stopped by the provider's content filter. Server message: "
        assert (
            capsys.readouterr().err.count(f"{line}content_filter invalid_request_error: The response was filtered") == 1
        )

    def test_a_row_that_is_answered_at_last_is_like_any_other(self, bench: Bench) -> None:
        bench.write(["cake", "poison-garbage"]).enrich()
        bench.server.faults.has_poison = False
        bench.enrich()
        bench.check()
        calls = len(bench.server.calls)
        bench.enrich()
        assert len(bench.server.calls) == calls


STOPPING = {
    "key": (
        401,
        error_body("Incorrect API key provided: sk-ab***yz", code="invalid_api_key"),
        "The API key was refused",
    ),
    "no access": (403, error_body("Project lacks access"), "Every request is refused by"),
    "model": (404, error_body("The model `x` does not exist", code="model_not_found"), "pass another --model"),
    "address": (404, "<html>", "does --base-url end in /v1"),
    "money": (429, error_body("You exceeded your quota", code="insufficient_quota"), "Out of credit or over budget"),
}


@pytest.mark.parametrize("name", STOPPING)
def test_a_pointless_job_stops_at_once_with_one_line(
    bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, body, line = STOPPING[name]
    bench.server.model.first_token = 0.05
    bench.write(make_texts(200)).enrich(limit=20, batch_size=10)
    bench.server.script.extend([(status, {}, body)] * 100)
    assert bench.command("--max-workers", "4") == 1
    errors = capsys.readouterr().err
    assert line in errors
    assert "sk-ab" not in errors
    assert "20 of 200 rows are labelled and saved" in errors
    assert len(bench.server.calls) <= 2 + 4 + 5  # with a probe, where the status alone proves nothing
    bench.check(blank_rows=range(20, 200))


def test_answers_in_flight_when_a_job_stops_are_kept(bench: Bench) -> None:
    bench.server.model.first_token = 0.3
    bench.server.script.append((401, {}, error_body("no")))
    with pytest.raises(module.ProviderError):
        bench.write(make_texts(40)).enrich(max_workers=4)
    assert sum(cells != ["", "", ""] for cells in bench.cells) == 30


def test_a_server_that_refuses_every_request_stops_the_job(bench: Bench) -> None:
    bench.server.script.extend([(400, {}, error_body("Something is wrong with your request"))] * 500)
    with pytest.raises(module.ProviderError, match=r"Every request is refused .* Something is wrong"):
        bench.write(make_texts(200)).enrich()
    assert len(bench.server.calls) <= 3 + 16


def test_one_request_that_is_refused_for_an_unknown_reason_stops_nothing(bench: Bench) -> None:
    bench.server.script.append((400, {}, error_body("Something is wrong with your request")))
    bench.write(make_texts(100)).enrich()
    bench.check()


@pytest.mark.usefixtures("quick")
def test_a_server_that_goes_away_stops_the_job(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich()
    bench.write(make_texts(400))
    wrong = [(503, {}, error_body("down"))] * 2000
    bench.server.script.extend([*wrong])
    with pytest.raises(module.ProviderError, match="fails every request"):
        bench.enrich(max_retries=3)
    bench.check(blank_rows=range(30, 400))


def test_a_server_that_cannot_be_reached_is_told(bench: Bench) -> None:
    bench.timing = module.Timing(unreachable=1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(module.ProviderError, match=r"No answer from 127\.0\.0\.1:\d+: no connection") as caught:
        bench.write(make_texts(100)).enrich(base_url=url)
    assert "secret" not in str(caught.value)
