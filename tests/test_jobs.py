"""Jobs: the same requests at half the price, in jobs of the Batch API that outlive the program, each paid once."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import FAST, LABELS, PEAK, ROOT, Bench, make_texts, price
from stand_in_rules import error_body
from stand_in_server import StandIn

import enrich_dataset as module


@pytest.mark.parametrize("skew", [-86_400.0, 86_400.0])
def test_a_job_is_found_again_whatever_the_two_clocks_say(bench: Bench, skew: float) -> None:
    bench.server.batches.clock_skew = skew
    bench.server.batches.hold_at = "created"
    bench.server.batches.seconds = 0.1
    process = bench.write(make_texts(40)).process("--batch-api", "--poll-interval", "0.1")
    assert bench.server.batches.held.wait(30)
    process.kill()
    process.communicate()
    bench.server.batches.let_go.set()
    bench.enrich(use_batch_api=True, poll_interval=0.05)
    bench.check()
    assert len(bench.server.batches.jobs) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from there")
def test_a_jobs_file_is_read_as_a_stream_and_its_lines_have_a_bound(bench: Bench) -> None:
    """A line without end before the answers, of 300 MB."""
    bench.server.batches.long_line = 300_000_000
    bench.write(make_texts(20))
    arguments = bench.arguments("--base-url", bench.server.url, "--quiet", "--batch-api", "--poll-interval", "0.05")
    run = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 300
    bench.check()
    assert len(bench.server.batches.jobs) == 1


class TestJobs:
    @pytest.mark.parametrize("kind", ["null", "empty", "html", "error", "half"])
    def test_a_job_whose_files_have_less_than_it_says_is_kept_and_told_and_nothing_is_paid_twice(
        self, bench: Bench, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.batches.broken_files.append(kind)
        told = bench.write(make_texts(100)).enrich(**FAST, quiet=False).attrs["enrichment"]
        assert "reports 10 completed requests, but its files hold fewer; keeping it" in capsys.readouterr().err
        assert set(told["blank_rows"].values()) == {module.IN_A_JOB}
        bench.enrich(**FAST)
        bench.check()
        assert len(bench.server.calls) == 10
        assert len(bench.server.batches.jobs) == 1

    @pytest.mark.parametrize("gone", ["job", "file"])
    def test_what_is_gone_for_good_is_told_and_can_be_given_up(
        self, bench: Bench, gone: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.batches.seconds = 0.3
        bench.write(make_texts(20)).enrich(**FAST, no_wait=True)
        time.sleep(0.4)
        if gone == "job":
            bench.server.batches.jobs.clear()
        else:
            bench.server.batches.broken_files.append("gone")
        assert bench.command("--batch-api", "--poll-interval", "0.05") == 1
        assert "abandon it with --forget-jobs" in capsys.readouterr().err
        before = len(bench.server.calls)
        assert bench.command("--forget-jobs", "--max-cost", "1") == 0
        assert "Job batch_1 is abandoned: 2 requests." in (captured := capsys.readouterr()).err
        assert len(bench.server.calls) == before + 2
        assert "all runs on this store" in captured.out  # what it may have cost stays set aside
        bench.check()

    def test_the_cap_knows_what_open_jobs_may_cost(self, bench: Bench) -> None:
        bench.server.batches.seconds = 60
        bench.write(make_texts(100)).enrich(**FAST, no_wait=True)
        with module.Store(bench.store) as store:
            spent, set_aside = store.money()
        assert spent == 0
        assert set_aside > price(bench.server.calls)
        with pytest.raises(module.BudgetExceeded, match=rf"set aside: \{module.dollars(set_aside)}"):
            bench.write(make_texts(150)).enrich(max_cost=set_aside * 1.01)
        assert not bench.server.calls

    def test_what_a_job_has_billed_is_kept_though_the_cap_ends_the_run_before_it_is_sent_again(
        self, bench: Bench
    ) -> None:
        """Answers that were cut off at our bound, by a tokenizer with a byte per token."""
        bench.write(make_texts(5)).enrich(answer_form="each")
        spent = price(bench.server.calls)
        bench.server.calls.clear()
        bench.server.model.bytes_per_token = 1
        bench.write(make_texts(35))
        with pytest.raises(module.BudgetExceeded):
            bench.enrich(**FAST, answer_form="each", max_cost=spent + 0.0012)
        assert 2 < len(bench.server.calls) < 9
        with module.Store(bench.store) as store:
            assert store.money()[0] == pytest.approx(spent + price(bench.server.calls) / 2)

    @pytest.mark.parametrize(
        "script", [[None] * 2 + [(400, {}, {})], [None] * 3 + [(400, {}, {})], [None] * 2 + [(413, {}, {})]]
    )
    def test_what_a_job_has_billed_is_kept_though_the_next_one_is_refused(
        self, bench: Bench, script: list[Any]
    ) -> None:
        bench.server.script.extend(script)
        with pytest.raises(module.ProviderError):
            bench.write([*make_texts(20), "poison-length cake"]).enrich(**FAST)
        with contextlib.closing(sqlite3.connect(bench.store)) as db:
            counted = db.execute(
                "SELECT sum(calls), sum(prompt_tokens), sum(completion_tokens) FROM attempts"
            ).fetchone()
        calls = bench.server.calls
        billed = sum(call.prompt_tokens for call in calls), sum(call.completion_tokens for call in calls)
        assert counted == (len(calls) + len(bench.server.spared_calls), *billed)
        assert "Batch API job" not in str(bench.enrich().attrs["enrichment"]["blank_rows"])

    def test_a_row_whose_answer_never_ends_is_given_up_by_runs_that_leave_and_each_of_its_bills_is_counted(
        self, bench: Bench
    ) -> None:
        bench.server.batches.seconds = 0.1
        bench.write([*make_texts(20), "poison-length cake"])
        reasons = []
        for _ in range(12):
            reasons.append(bench.enrich(**FAST, no_wait=True).attrs["enrichment"]["blank_rows"].get(20))
            time.sleep(0.15)
        assert "the answer was cut off at its maximum length" in reasons
        with contextlib.closing(sqlite3.connect(bench.store)) as db:
            assert db.execute("SELECT sum(calls) FROM attempts").fetchone() == (
                len(bench.server.calls + bench.server.spared_calls),
            )

    def test_what_is_left_of_the_cap_is_without_what_open_jobs_may_cost(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.batches.seconds = 60
        bench.write(make_texts(100)).enrich(**FAST, no_wait=True)
        with module.Store(bench.store) as store:
            set_aside = store.money()[1]
        assert bench.write(make_texts(110)).command("--max-cost", "1") == 3
        left = float(re.findall(r"left of --max-cost: \$([\d.]+)", capsys.readouterr().out)[0])
        assert left == pytest.approx(1 - set_aside - price(bench.server.calls), abs=1e-4)

    def test_a_job_is_billed_at_the_price_at_which_it_was_ordered(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.2
        bench.write(make_texts(20)).enrich(**FAST, no_wait=True, price=(10.0, 20.0))
        told = bench.enrich(**FAST).attrs["enrichment"]
        assert told["cost"] == pytest.approx(price(bench.server.calls, 10.0, 20.0))
        bench.write(make_texts(40)).enrich(model="gpt-4.1", **FAST, no_wait=True)
        calls = len(bench.server.calls)
        told = bench.enrich(**FAST).attrs["enrichment"]
        old, new = bench.server.calls[calls : calls + 4], bench.server.calls[calls + 4 :]
        assert told["cost"] == pytest.approx((price(old, 2.0, 8.0) + price(new)) / 2)

    def test_what_the_rest_would_cost_is_that_of_the_rows_that_remain(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(200)).enrich(limit=100, **FAST, no_wait=True)
        bench.server.script.extend([None, (401, {}, error_body("no"))])
        bench.enrich(**FAST, no_wait=True, limit=100)
        bench.server.calls.clear()
        bench.server.script.extend([None, (401, {}, error_body("no"))])
        with pytest.raises(module.ProviderError):
            bench.enrich(max_workers=1, quiet=False)
        rest = re.findall(r"the rest would cost about \$(\d\.\d+)", capsys.readouterr().err)
        each = price([call for call in bench.server.calls if call.status == 200])
        assert float(rest[0]) == pytest.approx(9 * each, rel=0.1)

    def test_a_row_edited_meanwhile_keeps_no_neighbour_from_being_asked(self, bench: Bench) -> None:
        texts = make_texts(20)
        bench.server.batches.seconds = 0.2
        bench.server.batches.plans.append({"ends": "expired", "share": 0.5})
        bench.write(texts).enrich(**FAST, no_wait=True)
        bench.write([*texts[:15], "an attack, edited", *texts[16:]]).enrich(**FAST)
        bench.check()
        assert sorted(bench.asked) == sorted({*texts[:15], *texts[16:], "an attack, edited"})

    def test_a_429_is_waited_for(self, bench: Bench) -> None:
        limited = (429, {"retry-after-ms": "1"}, error_body("slow down"))
        bench.server.script.extend([*[limited] * 8, None, *[limited] * 8])  # uploading and creating
        bench.server.batches.looks.extend([limited] * 8 + [None] + [limited] * 8)  # polling and downloading
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()
        assert not bench.server.batches.looks

    def test_a_413_to_a_poll_is_one_line(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.batches.looks.append((413, {}, error_body("too large")))
        assert bench.write(make_texts(20)).command("--batch-api", "--poll-interval", "0.05") == 1
        errors = capsys.readouterr().err
        assert "rejects uploads of this size (HTTP 413)" in errors
        assert "unexpected" not in errors
        assert bench.command("--batch-api", "--poll-interval", "0.05") == 0
        bench.check()

    def test_a_list_as_the_reply_to_an_upload_ends_the_run(self, bench: Bench) -> None:
        bench.server.script.append((200, {}, ["x"]))
        with pytest.raises(module.ProviderError, match=r"fails \(HTTP 200\): run the same command later"):
            bench.write(make_texts(20)).enrich(**FAST)
        bench.enrich(**FAST)
        bench.check()

    @pytest.mark.parametrize("kind", ["error-first", "nested"])
    def test_odd_lines_of_a_jobs_file_cost_no_answer(self, bench: Bench, kind: str) -> None:
        bench.server.batches.broken_files.append(kind)
        bench.write(make_texts(100)).enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    @pytest.mark.parametrize(
        "fields", [{"request_counts": {}}, {"request_counts": None}, {"request_counts": {"completed": "many"}}]
    )  # fmt: skip
    def test_odd_fields_cost_themselves_alone(self, bench: Bench, fields: dict[str, Any]) -> None:
        bench.server.batches.odd_fields = fields
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()

    @pytest.mark.usefixtures("soon")
    @pytest.mark.parametrize(
        "trouble", ["lags", "has no end", "is oldest first", "holds odd ones", "is of another clock"]
    )
    def test_a_job_is_found_in_any_list_after_its_reply_was_lost(self, bench: Bench, trouble: str) -> None:
        for count in range(1, 6):  # on more than one page
            bench.write(make_texts(count)).enrich(**FAST)
        bench.server.batches.pages_lag = {"lags": 2, "has no end": 3}.get(trouble, 0)
        bench.server.batches.endless_pages = trouble == "has no end"
        bench.server.batches.oldest_first = trouble == "is oldest first"
        bench.server.batches.clock_skew = -86_400.0 * (trouble == "is of another clock")
        if trouble == "holds odd ones":
            bench.server.batches.strange_jobs = ["no object", None, {"id": "x"}, {"metadata": "x"}, {"metadata": None}]
        bench.server.batches.hold_at = "created"
        bench.write(make_texts(30)).enrich(**FAST, timeout=0.3)
        bench.server.batches.let_go.set()
        bench.check()
        assert len(bench.server.batches.jobs) == 6

    def test_a_foreign_line_in_the_place_of_one_of_ours_keeps_the_job_open(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.2
        bench.write(make_texts(20)).enrich(**FAST, batch_size=5, no_wait=True)
        time.sleep(0.3)
        foreign = b'{"custom_id": "foreign", "response": {"status_code": 200, "body": {}}}\n[1]\n{"custom_id": [1]}\n'
        bench.server.batches.break_next(lambda content: foreign + b"".join(content.splitlines(keepends=True)[1:]))
        bench.enrich(**FAST, batch_size=5, no_wait=True)
        assert open_requests(bench) == 1
        bench.enrich(**FAST, batch_size=5)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_a_clock_that_has_jumped_ahead_submits_no_job_twice(self, bench: Bench) -> None:
        bench.server.batches.hold_at, bench.server.batches.pages_lag = "created", 2
        process = bench.write(make_texts(20)).process("--batch-api", "--poll-interval", "0.1")
        assert bench.server.batches.held.wait(30)
        process.kill()
        process.communicate()
        bench.server.batches.let_go.set()
        bench.timing = module.Timing(utc_now=lambda: datetime.now(UTC) + timedelta(days=1), find_job=3.0)
        bench.enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_a_job_without_usage_counts_at_its_worst_under_a_cap(self, bench: Bench) -> None:
        bench.server.model.odd_reply = {"usage": None}
        bench.write(make_texts(20)).enrich(**FAST, batch_size=5)
        with module.Store(bench.store) as store:
            spent, aside = store.money()
        assert aside == 0
        assert spent > price(bench.server.calls) / 2
        with pytest.raises(module.BudgetExceeded):
            bench.write(make_texts(200)).enrich(**FAST, batch_size=5, max_cost=spent * 1.5)

    @pytest.mark.parametrize(
        "errors", ["the queue is gone", ["the queue is gone"], {"data": "the queue is gone"}, None]
    )
    def test_a_failed_job_is_told_whatever_form_its_errors_have(self, bench: Bench, errors: Any) -> None:
        bench.server.batches.odd_fields = {"status": "failed", "output_file_id": None, "errors": errors}
        told = "the queue is gone" if errors and "data" not in errors else ""
        with pytest.raises(module.ProviderError, match=f"rejected job batch_1: .*{told}"):
            bench.write(make_texts(20)).enrich(**FAST)

    def test_leaving_without_a_store_is_refused(self, server: StandIn) -> None:

        with pytest.raises(
            module.InputError, match="no_wait needs a store, or the results could not be collected later"
        ):
            module.enrich_dataframe(
                pd.DataFrame({"text": ["a"]}), "text", LABELS, base_url=server.url, use_batch_api=True, no_wait=True
            )
        assert not server.batches.files


def by_job(bench: Bench) -> dict[str, list[str]]:
    """The texts that each job was asked."""
    asked: dict[str, list[str]] = {}
    for call in bench.server.calls:
        asked.setdefault(call.job, []).extend(call.texts)
    return asked


def open_requests(bench: Bench) -> int:
    with module.Store(bench.store) as store:
        return sum(len(open_job.attempts) for open_job in store.open_jobs())


@pytest.mark.every_form
def test_cells_are_right_at_half_the_price_after_one_live_call_about_a_harmless_text(bench: Bench) -> None:
    bench.server.batches.seconds = 0.2
    frame = bench.write([*make_texts(95), "cake", "cake"]).enrich(**FAST)
    bench.check()
    assert set(by_job(bench)) == {"batch_1"}
    told = frame.attrs["enrichment"]
    assert len(bench.server.calls) == 10
    assert told["calls"] == 10 + len(bench.server.spared_calls) == 11
    assert told["cost"] == pytest.approx(price(bench.server.calls) / 2)
    assert open_requests(bench) == 0
    bench.enrich(**FAST)
    assert len(bench.server.batches.jobs) == 1


@pytest.mark.every_form
def test_a_job_carries_the_bodies_that_live_calls_carry(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich(**FAST)
    bench.enrich(fresh=True)
    in_job, live = bench.server.calls
    assert in_job.body == live.body


def test_a_run_of_jobs_prints_what_it_submits_and_how_far_it_is(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.server.batches.seconds = 0.3
    assert bench.write(make_texts(30)).command("--batch-api", "--poll-interval", "0.05") == 0
    printed, errors = capsys.readouterr()
    assert "Sent as Batch API jobs: half the price, answers within a day\n" in printed
    assert "Submitting them to the Batch API...\n" in printed
    assert "Job batch_1 submitted: 3 requests. It continues without this program, which you may close" in errors
    assert re.search(r"75%.*3/4 |50%.*2/4 ", errors)  # with the live call, and what the job says that it has done
    assert re.search(r"100%.*4/4 ", errors)


def test_a_price_of_the_users_is_taken_as_it_is(bench: Bench) -> None:
    frame = bench.write(make_texts(20)).enrich(**FAST, price=(1.0, 2.0))
    assert frame.attrs["enrichment"]["cost"] == pytest.approx(price(bench.server.calls, 1.0, 2.0))


class TestKilled:
    POINTS = ("upload", "uploaded", "create", "created", "poll", "download")

    @pytest.mark.parametrize("point", POINTS)
    def test_whenever_it_is_killed_the_same_command_ends_the_job_and_all_is_paid_once(
        self, bench: Bench, point: str
    ) -> None:
        bench.server.batches.seconds = 0.3
        bench.server.batches.hold_at = point
        arguments = ("--batch-api", "--poll-interval", "0.1")
        process = bench.write(make_texts(200)).process(*arguments)
        assert bench.server.batches.held.wait(30)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        bench.server.batches.let_go.set()
        assert bench.process(*arguments).wait(60) == 0
        bench.check()
        assert sorted(bench.asked) == sorted(bench.texts)
        assert len(bench.server.batches.jobs) == 1

    def test_a_run_that_ends_between_two_replies_of_a_job_records_the_rest_alone_next_time(self, bench: Bench) -> None:
        """A disk that is full in the middle of taking in what a job has answered."""
        bench.server.batches.seconds = 0.2
        bench.write(make_texts(100)).enrich(**FAST, no_wait=True)
        full = "WHEN (SELECT count(*) FROM attempts) = 4 BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        with contextlib.closing(sqlite3.connect(bench.store)) as db:  # 4 with the live call
            db.execute(f"CREATE TRIGGER full BEFORE INSERT ON attempts {full}")
        time.sleep(0.3)
        with pytest.raises(module.EnrichmentError, match="disk is full"):
            bench.enrich(**FAST)
        with contextlib.closing(sqlite3.connect(bench.store)) as db:
            db.execute("DROP TRIGGER full")
        assert open_requests(bench) == 7
        bench.enrich(**FAST)
        bench.check()
        assert len(bench.server.calls) == 10
        with module.Store(bench.store) as store:
            assert store.db.execute("SELECT count(*) FROM attempts WHERE outcome != 'probe'").fetchone() == (10,)


class TestLeft:
    def test_submit_leave_and_collect(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.batches.seconds = 0.5
        bench.write(make_texts(40))
        assert bench.command("--batch-api", "--no-wait") == 3
        printed = capsys.readouterr().out
        assert "Rows in Batch API jobs (the same command with --batch-api collects them): 40\n" in printed
        assert "Enrichment complete" not in printed
        assert bench.server.calls == []
        assert bench.command("--batch-api", "--no-wait") == 3
        assert "Rows in open Batch API jobs (not sent again): 40\n" in capsys.readouterr().out
        time.sleep(0.6)
        assert bench.command("--batch-api", "--no-wait") == 0
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_a_live_run_leaves_to_a_job_what_it_was_asked(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.5
        bench.write(make_texts(20)).enrich(**FAST, no_wait=True)
        bench.write(make_texts(30))
        frame = bench.enrich()
        assert {call.job for call in bench.server.calls} == {""}
        assert set(frame.attrs["enrichment"]["blank_rows"].values()) == {module.IN_A_JOB}
        bench.check(blank_rows=range(20))
        bench.enrich(**FAST)
        bench.check()
        assert sorted(bench.asked) == sorted(bench.texts)

    def test_a_label_that_is_added_meanwhile_is_asked_for_itself(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.3
        bench.write(make_texts(20)).enrich(LABELS[:2], **FAST, no_wait=True)
        bench.enrich(**FAST)
        bench.check()
        assert [call.labels for call in bench.server.calls] == [tuple(LABELS[:2])] * 2 + [(LABELS[2],)] * 2

    def test_a_job_of_another_question_is_collected_too(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.2
        bench.write(make_texts(20)).enrich(model="gpt-6-luna", **FAST, no_wait=True)
        bench.enrich(**FAST)
        bench.check()
        calls = len(bench.server.calls)
        bench.enrich(model="gpt-6-luna")
        assert len(bench.server.calls) == calls

    def test_rows_that_have_left_the_table_keep_their_answers(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.2
        texts = make_texts(30)
        bench.write(texts).enrich(**FAST, no_wait=True)
        bench.write(texts[15:]).enrich(**FAST)
        bench.check()
        bench.write(texts).enrich()
        bench.check()
        assert len(bench.asked) == 30

    def test_labels_of_an_array_are_collected_by_the_next_run(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich(np.array(LABELS), **FAST, no_wait=True)
        bench.enrich(np.array(LABELS), **FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_ctrl_c_leaves_the_job_running_and_says_so(self, bench: Bench) -> None:
        bench.server.batches.seconds = 1.0
        process = bench.write(make_texts(40)).process("--batch-api", "--poll-interval", "30")
        for _ in range(500):
            time.sleep(0.02)
            if bench.server.batches.jobs:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 130
        assert "Batch API jobs continue without it. The same command resumes from here." in errors
        bench.enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1


class TestUnhappyEnds:
    @pytest.mark.parametrize("end", ["expired", "cancelled"])
    def test_half_of_a_job_that_ends_early_goes_into_the_next(self, bench: Bench, end: str) -> None:
        bench.server.batches.plans.append({"ends": end, "share": 0.5})
        bench.write(make_texts(200)).enrich(**FAST)
        bench.check()
        asked = by_job(bench)
        assert sorted(asked["batch_2"]) == sorted(set(bench.texts) - set(asked["batch_1"]))
        assert len(asked["batch_2"]) == 100

    def test_a_job_that_did_nothing_goes_into_the_next_and_after_three_its_rows_are_left_to_the_next_run(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.batches.plans.extend([{"ends": "expired", "share": 0.0}, {"ends": "cancelled", "share": 0.0}])
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()
        bench.server.batches.plans.extend([{"ends": "expired", "share": 0.0}] * 3)
        bench.write(make_texts(30)[20:]).enrich(**FAST, quiet=False)
        assert "Job batch_6 expired before all was done: 1 requests are left." in capsys.readouterr().err
        bench.check(blank_rows=range(10))
        bench.enrich(**FAST)
        bench.check()

    def test_content_failures_go_into_smaller_jobs_three_in_all(self, bench: Bench) -> None:
        texts = make_texts(40)
        for number, fault in ((3, "refusal"), (17, "garbage"), (25, "400-filter"), (35, "missing")):
            texts[number] += f" poison-{fault}"
        frame = bench.write(texts).enrich(**FAST)
        bench.check(blank_rows=[3, 17, 25, 35])
        assert set(by_job(bench)) == {"batch_1", "batch_2", "batch_3"}
        assert sorted(by_job(bench)["batch_3"]) == sorted(texts[number] for number in (3, 17, 25, 35))
        assert frame.attrs["enrichment"]["blank_rows"] == {
            3: "the model refused to answer",
            17: "the answer was not valid JSON",
            25: "stopped by the provider's content filter",
            35: "its id was missing from the answer, or repeated",
        }

    def test_a_request_on_which_the_server_fails_is_asked_again_whole_and_then_row_by_row(self, bench: Bench) -> None:
        texts = make_texts(40)
        texts[17] += " poison-500"
        bench.write(texts).enrich(**FAST)
        bench.check(blank_rows=[17])
        rows = {name: [len(call.texts) for call in bench.server.calls if call.job == name] for name in by_job(bench)}
        assert rows == {"batch_1": [10] * 4, "batch_2": [10], "batch_3": [1] * 10}

    def test_a_file_holds_no_more_bytes_than_the_provider_takes(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "JOB_BYTES", 6_000)
        bench.write(make_texts(100)).enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.files) > len(bench.server.batches.jobs) > 2
        assert all(
            len(content) <= 6_000 for name, content in bench.server.batches.files.items() if b'"method"' in content
        )

    def test_a_queue_shorter_than_a_file_makes_smaller_files(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.1
        bench.server.batches.queue_tokens = 500
        bench.write(make_texts(100)).enrich(**FAST)
        bench.check()
        assert sorted(bench.asked) == sorted(bench.texts)
        assert max(map(len, by_job(bench).values())) < 100

    def test_another_refusal_is_told_in_the_providers_words(self, bench: Bench) -> None:
        error = {"code": "billing_hard_limit_reached", "message": "Billing hard limit has been reached", "line": None}
        bench.server.batches.plans.append({"error": error})
        with pytest.raises(module.ProviderError, match=r"rejected job batch_1: .*Billing hard limit has been reached"):
            bench.write(make_texts(20)).enrich(**FAST)
        bench.enrich(**FAST)
        bench.check()

    def test_a_server_without_jobs_is_told_in_one_line(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.batches.exists = False
        assert bench.write(make_texts(20)).command("--batch-api") == 1
        assert "has no Batch API (HTTP 404): drop --batch-api." in capsys.readouterr().err
        bench.enrich()
        bench.check()

    def test_a_job_that_the_key_does_not_see_is_not_submitted_again(self, bench: Bench) -> None:
        bench.server.batches.seconds = 5
        bench.write(make_texts(20)).enrich(**FAST, no_wait=True)
        jobs, bench.server.batches.jobs = bench.server.batches.jobs, {}
        with pytest.raises(module.ProviderError, match="does not know batch_1: use the key and address it was"):
            bench.enrich(**FAST)
        assert not bench.server.batches.jobs
        assert open_requests(bench) == 2
        bench.server.batches.seconds, bench.server.batches.jobs = 0, jobs
        bench.enrich(**FAST)
        bench.check()

    def test_a_reply_to_creating_a_job_that_is_lost_creates_no_second(self, bench: Bench) -> None:
        bench.server.batches.hold_at = "created"
        bench.server.batches.seconds = 0.1
        bench.write(make_texts(20)).enrich(**FAST, timeout=0.5)
        bench.server.batches.let_go.set()
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_a_failing_server_is_asked_again(self, bench: Bench) -> None:
        bench.server.script.extend([(503, {"retry-after-ms": "10"}, {})] * 2)
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()

    def test_a_server_that_always_fails_ends_the_run_in_one_line(self, bench: Bench) -> None:
        bench.server.script.extend([(503, {"retry-after-ms": "1"}, {})] * 9)
        with pytest.raises(module.ProviderError, match=r"fails \(HTTP 503\): run the same command later"):
            bench.write(make_texts(20)).enrich(**FAST)
        assert not bench.server.script
        bench.enrich(**FAST)
        bench.check()

    def test_a_part_that_a_model_refuses_is_left_out_of_the_first_job(self, bench: Bench) -> None:
        bench.server.gate.refuses, bench.spares_probes = {"temperature"}, False
        bench.write(make_texts(40)).enrich(**FAST)
        bench.check()
        assert set(by_job(bench)) == {"", "batch_1"}

    def test_a_part_that_jobs_alone_refuse_is_left_out_of_the_next_one(self, bench: Bench) -> None:
        bench.write(make_texts(40)).enrich(limit=10)
        bench.server.gate.refuses = {"temperature"}
        bench.enrich(**FAST, limit=20)
        bench.spares_probes = False
        bench.enrich(**FAST)
        bench.check()

    def test_a_job_that_is_refused_at_its_creation_leaves_nothing_behind(self, bench: Bench) -> None:
        bench.server.script.extend([None, (404, {}, {})])
        with pytest.raises(module.ProviderError, match="has no Batch API"):
            bench.write(make_texts(20)).enrich(**FAST)
        assert open_requests(bench) == 0
        bench.enrich()
        bench.check()

    def test_a_wrong_key_is_told_in_the_servers_words(self, bench: Bench) -> None:
        bench.server.script.append((401, {}, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}))
        with pytest.raises(
            module.ProviderError,
            match=r"The API key was refused by .* Server message: invalid_api_key: Incorrect API key",
        ):
            bench.write(make_texts(20)).enrich(**FAST)

    def test_a_server_that_cannot_be_reached_is_told_soon(self, bench: Bench) -> None:
        bench.timing = module.Timing(unreachable=0.5)
        with pytest.raises(module.ProviderError, match=r"fails every request \(no connection \(ConnectError\)\)"):
            bench.write(make_texts(20)).enrich(**FAST, base_url="http://127.0.0.1:9/v1")

    def test_a_request_that_no_model_answers_ends_the_run_and_keeps_the_others(self, bench: Bench) -> None:
        texts = make_texts(20)
        texts[3] += " poison-404-model"
        with pytest.raises(module.ProviderError, match="The model 'gpt-4o-mini' or the address was not found"):
            bench.write(texts).enrich(**FAST)
        bench.check(blank_rows=range(10))

    def test_leftovers_of_another_question_are_not_asked_again(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.2
        bench.server.batches.plans.append({"ends": "expired", "share": 0.5})
        bench.write(make_texts(20)).enrich(model="gpt-6-luna", **FAST, no_wait=True)
        bench.enrich(**FAST)
        bench.check()
        assert [call.body["model"] for call in bench.server.calls].count("gpt-6-luna") == 1
        assert open_requests(bench) == 0

    def test_a_job_in_which_all_is_refused_ends_the_run(self, bench: Bench) -> None:
        bench.server.gate.refuses, bench.spares_probes = {"model"}, False
        with pytest.raises(module.ProviderError, match="Every request is refused by"):
            bench.write(make_texts(100)).enrich(**FAST)
        assert len([call for call in bench.server.calls if call.job]) == 10

    def test_a_page_of_html_is_no_job(self, bench: Bench) -> None:
        bench.timing = module.Timing(find_job=0.2)
        page = (200, {}, "<html>Hello</html>")
        bench.server.script.append(page)
        with pytest.raises(module.ProviderError, match=r"fails \(HTTP 200\): run the same command later.*Hello"):
            bench.write(make_texts(20)).enrich(**FAST)
        bench.server.script.extend([None, page])
        with pytest.raises(module.ProviderError, match=r"fails \(HTTP 200\)"):
            bench.enrich(**FAST)
        bench.enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_leftovers_of_another_question_are_not_asked_again_after_a_server_error(self, bench: Bench) -> None:
        bench.server.batches.seconds = 0.2
        bench.server.faults.shares = {"500": 1.0}
        bench.write(make_texts(20)).enrich(model="gpt-6-luna", **FAST, no_wait=True)
        time.sleep(0.3)
        bench.enrich(**FAST, no_wait=True)
        assert {call.body["model"] for call in bench.server.calls} == {"gpt-6-luna"}
        bench.server.faults.shares = {}
        bench.enrich(**FAST)
        bench.check()

    def test_lines_that_are_no_answers_leave_their_requests_open(self) -> None:
        nested = b"[" * 100_000
        content = b'{"custom_id": "a"}\n[1]\n{"error": 1}\n' + nested + b'\nnonsense\n\n{"custom_id": "b"}'
        lines = list(module.read_lines(io.BytesIO(content)))
        assert lines == [{"custom_id": "a"}, {"custom_id": "b"}]

    def test_a_request_without_a_reply_is_sent_again_and_given_up_with_a_reason(self, bench: Bench) -> None:
        """Lines with status_code 0 and an empty body: ellmer issue 830, and OpenAI's forum."""
        texts = make_texts(40)
        texts[17] += " poison-status-0"
        frame = bench.write(texts).enrich(**FAST)
        bench.check(blank_rows=[17])
        assert set(frame.attrs["enrichment"]["blank_rows"].values()) == {"the job's file holds no answer to it"}
        assert bench.asked.count(texts[17]) == 3

    def test_no_wait_is_for_jobs(self, bench: Bench) -> None:
        with pytest.raises(module.InputError, match="no_wait is for Batch API jobs"):
            bench.write(["cake"]).enrich(no_wait=True)


class TestFiles:
    """What jobs are made of, and what they leave; shapes from the documents and recordings that each test names."""

    # Azure's documents and a live report of OpenAI (kaibo issue 93) have "", OpenAI's recordings null.
    @pytest.mark.parametrize("end", ["completed", "expired", "cancelled"])
    @pytest.mark.parametrize("missing", ["", None])
    def test_a_file_that_a_job_does_not_have_is_not_fetched(self, bench: Bench, missing: str | None, end: str) -> None:
        bench.server.batches.no_file = missing
        bench.server.batches.plans.append({"ends": end})
        bench.write(make_texts(40)).enrich(**FAST)
        bench.check()
        assert sorted(bench.asked) == sorted(bench.texts)
        assert len(bench.server.batches.jobs) == 1

    @pytest.mark.parametrize(
        "fields",
        [
            {"endpoint": None, "metadata": None, "errors": None, "error_file_id": ""},  # Azure's documents
            {"created_at": 1762136757000, "failed_at": 946656000000, "error_file_id": ""},  # a provider in milliseconds
            {"error_file_id": "file-gone"},
        ],
    )
    def test_a_job_is_collected_whatever_else_its_object_says(self, bench: Bench, fields: dict[str, Any]) -> None:
        bench.server.batches.odd_fields = fields
        bench.write(make_texts(40)).enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_a_job_whose_requests_all_failed_has_no_output(self, bench: Bench) -> None:
        """It is `completed` with an empty output_file_id (litellm issue 33987)."""
        bench.server.batches.no_file = ""
        bench.write([f"{text} poison-400-filter" for text in make_texts(3)]).enrich(**FAST)
        bench.check(blank_rows=[0, 1, 2])
        assert open_requests(bench) == 0

    def test_a_result_that_is_gone_is_not_taken_for_a_missing_batch_api(self, bench: Bench) -> None:
        bench.server.batches.odd_fields = {"output_file_id": "file-gone"}
        with pytest.raises(module.ProviderError, match="does not know file-gone"):
            bench.write(make_texts(20)).enrich(**FAST)
        bench.server.batches.odd_fields = {}
        bench.enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1

    def test_a_job_waits_until_its_file_is_processed(self, bench: Bench) -> None:
        """Azure (openai-dotnet issue 312)."""
        bench.server.batches.file_states.extend(["pending", "pending", "running"])
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()
        assert not bench.server.batches.file_states

    def test_a_file_that_the_server_could_not_process_ends_the_run_in_its_words(self, bench: Bench) -> None:
        bench.server.batches.file_states.extend(["pending", "error"])
        with pytest.raises(module.ProviderError, match=r"Server message: .*The file is in state error"):
            bench.write(make_texts(20)).enrich(**FAST)

    # Azure (openai-dotnet issue 312), and OpenAI (curator issue 116).
    NOT_READY = ((400, "The file is in state pending"), (404, "Cannot find file file-1"), (400, "No such File: file-1"))

    def test_a_job_is_created_again_from_a_file_that_is_not_found_at_once(self, bench: Bench) -> None:
        replies = [(status, {}, {"error": {"message": words}}) for status, words in self.NOT_READY]
        bench.server.script.extend([None, *replies])
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()
        assert len(bench.server.batches.jobs) == 1
        assert sum(b'"method"' in content for content in bench.server.batches.files.values()) == 1

    def test_a_file_that_is_never_found_ends_the_run_in_the_servers_words(self, bench: Bench) -> None:
        bench.timing = module.Timing(find_file=0.3)
        bench.server.script.extend([None, *[(404, {}, {"error": {"message": "Cannot find file file-1"}})] * 99])
        with pytest.raises(module.ProviderError, match=r"does not find the file of a job .* Cannot find file file-1"):
            bench.write(make_texts(20)).enrich(**FAST)
        bench.server.script.clear()
        bench.enrich(**FAST)
        bench.check()

    def test_what_a_job_was_asked_that_did_not_find_its_file_goes_into_the_next(self, bench: Bench) -> None:
        """It goes away by itself (kaibo issue 169)."""
        error = {"code": "invalid_request", "message": "Cannot find file file-1, or organization org-x does not."}
        bench.server.batches.plans.extend([{"error": error}, {"error": error}])
        bench.write(make_texts(20)).enrich(**FAST)
        bench.check()
        assert sorted(bench.asked) == sorted(bench.texts)
        assert len(bench.server.batches.jobs) == 3

    FULL = (400, {}, {"error": {"code": "token_limit_exceeded", "message": "Enqueued too many tokens"}})  # Azure's docs

    def test_a_creation_that_is_refused_because_the_queue_is_full_is_smaller_and_then_waits(self, bench: Bench) -> None:
        bench.server.script.extend([None, self.FULL, None, None, None, self.FULL])
        bench.write(make_texts(40)).enrich(**FAST)
        bench.check()
        assert not bench.server.script
        assert [len(texts) for texts in by_job(bench).values()] == [20, 20]

    def test_a_job_without_an_id_is_an_error_that_says_so(self, bench: Bench) -> None:
        """As xAI answers, whose jobs are of another kind."""
        bench.timing = module.Timing(find_job=0.2)
        bench.server.script.extend([None, (200, {}, {"batch_id": "batch_6", "state": {"num_requests": 0}})])
        with pytest.raises(module.ProviderError, match="created a job without an id"):
            bench.write(make_texts(20)).enrich(**FAST)
        assert open_requests(bench) == 0
        bench.enrich()
        bench.check()


class TestCap:
    def test_jobs_are_submitted_as_far_as_the_cap_allows(self, bench: Bench) -> None:
        bench.write(make_texts(400)).enrich(store_filepath=bench.store.with_name("other"))
        whole = price(bench.server.calls) / 2
        bench.server.calls.clear()
        with pytest.raises(module.BudgetExceeded):
            bench.enrich(**FAST, max_cost=whole / 3, overwrite=True)
        assert whole / 8 < price(bench.server.calls) / 2 <= whole / 3
        bench.enrich(**FAST, max_cost=whole * 9)
        bench.check()
        assert price(bench.server.calls) / 2 == pytest.approx(whole)
