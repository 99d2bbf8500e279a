"""The Batch API: the same requests at half the price, in jobs that outlive the program, each paid once."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sqlite3
import time
from typing import Any

import numpy as np
import pytest
from conftest import LABELS, Bench, make_texts
from test_cost import price

import enrich_dataset as module

FAST = {"use_batch_api": True, "poll_interval": 0.05}

pytestmark = pytest.mark.every_form


def by_job(bench: Bench) -> dict[str, list[str]]:
    """The texts that each job was asked."""
    asked: dict[str, list[str]] = {}
    for call in bench.server.calls:
        asked.setdefault(call.job, []).extend(call.texts)
    return asked


def open_requests(bench: Bench) -> int:
    with module.Store(bench.store) as store:
        return sum(len(open_job.attempts) for open_job in store.open_jobs())


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


def test_a_job_carries_the_bodies_that_live_calls_carry(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich(**FAST)
    bench.enrich(fresh=True)
    in_job, live = bench.server.calls
    assert in_job.body == live.body


def test_what_is_printed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
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

    @pytest.mark.one_form
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
        bench.server.faults.shares = {"500": 0.3}
        bench.write(make_texts(200)).enrich(**FAST)
        blank = [number for number, cells in enumerate(bench.cells) if "" in cells]
        assert len(blank) <= 30  # 10 for each of a request's two jobs, and a row by itself in the third
        bench.check(blank_rows=blank)
        bench.server.faults.shares = {}
        bench.enrich(**FAST)
        bench.check()
        assert [len(call.texts) for call in bench.server.calls if call.job == "batch_2"].count(10) > 2

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

    def test_a_wrong_key_is_told_as_ever(self, bench: Bench) -> None:
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
