"""Servers, networks and disks at their worst: bounded in money, time, memory and reach, and never a wrong cell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, ROOT, Bench, make_texts
from stand_in_rules import error_body
from stand_in_server import StandIn
from test_cost import MINI, price

import enrich_dataset as module

FAST = {"use_batch_api": True, "poll_interval": 0.05}
# The command, which then prints its peak memory in MiB: not as getrusage has it, which counts the program that started it.
PEAK = """
import pathlib, re, sys, enrich_dataset
code = enrich_dataset.main(sys.argv[1:])
print(int(re.findall(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[0]) // 1024)
sys.exit(code)
"""


@pytest.fixture
def soon(bench: Bench) -> None:
    """All that takes long takes a second, or five."""
    bench.timing = module.Timing(call=1.0, stop=1.0, find_job=5.0, longest_backoff=0.05)


def billed(bench: Bench) -> float:
    """What the server has billed, in US dollars."""
    return sum(price([call], MINI[0] * bench.server.model.bills) for call in bench.server.calls)


@pytest.mark.every_form
class TestMoney:
    @pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
    def test_the_cap_is_passed_at_most_by_what_calls_in_flight_cost_beyond_their_bounds(
        self, bench: Bench, factor: float
    ) -> None:
        bench.server.model.bills, bench.server.model.first_token = factor, 0.02
        cap = 0.02
        with pytest.raises(module.BudgetExceeded):
            bench.write(make_texts(4000)).enrich(max_cost=cap, max_workers=4)
        calls = [call for call in bench.server.calls if call.status == 200]
        dearest = max(price([call], MINI[0] * factor) for call in calls)
        assert cap / 4 < billed(bench) <= cap + (4 * dearest if factor > 1 else 0.0)

    @pytest.mark.parametrize("fault", ["500", "cut", "reset"])
    def test_a_call_that_may_have_been_billed_keeps_what_was_set_aside(
        self, bench: Bench, fault: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.timing = module.Timing(longest_backoff=0.05)
        bench.server.random.seed(3)
        bench.server.faults.shares = {fault: 0.3}
        assert bench.write(make_texts(60)).command("--max-cost", "1") == 0
        failed = sum(call.fault == fault for call in bench.server.calls)
        printed = capsys.readouterr().out
        counted, aside = re.findall(r"Cost: \$([\d.]+), plus up to \$([\d.]+) for \d+ calls? of unknown cost", printed)[
            0
        ]
        assert f" for {failed} call{'s' * (failed > 1)} of unknown cost" in printed
        assert float(counted) == pytest.approx(price([call for call in bench.server.calls if not call.fault]), rel=0.01)
        assert float(aside) > failed * float(counted) / 6
        with module.Store(bench.store) as store:
            assert store.money()[0] == pytest.approx(float(counted) + float(aside), rel=0.01)

    def test_no_tokenizer_that_has_a_byte_a_token_or_more_bills_beyond_what_is_set_aside(self, bench: Bench) -> None:
        """Where our guess of the tokens would let a call leave that costs more than the cap."""
        cap, bench.server.model.bills = 0.001, 3.0
        bench.write([f"tram number {number} " + "goes there and back " * 100 for number in range(30)])
        with pytest.raises(module.BudgetExceeded):
            bench.enrich(max_cost=cap)
        assert billed(bench) <= cap
        bench.enrich(max_cost=cap * 20)
        bench.check()

    @pytest.mark.one_form
    def test_a_call_that_timed_out_keeps_what_was_set_aside_for_it(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.on_call = lambda number, body: time.sleep(0.0 if number else 1.0)
        assert bench.write(["cake"]).command("--max-cost", "1", "--timeout", "0.4") == 0
        assert " for 1 call of unknown cost" in capsys.readouterr().out
        with module.Store(bench.store) as store:
            assert store.money()[0] > 1.5 * price(bench.server.calls[-1:])

    @pytest.mark.one_form
    @pytest.mark.usefixtures("soon")
    def test_a_call_that_was_given_up_keeps_what_was_set_aside_for_it(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def drip_once(number: int, body: Any) -> None:
            bench.server.faults.shares = {} if number else {"drip-blanks": 1.0}

        bench.server.on_call = drip_once
        assert bench.write(["cake"]).command("--max-cost", "1", "--timeout", "2.5") == 0
        assert " for 1 call of unknown cost" in capsys.readouterr().out
        with module.Store(bench.store) as store:
            assert store.money()[0] > 1.5 * price(bench.server.calls[-1:])
        bench.check()


class TestTime:
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
        self, bench: Bench, fault: str, more: tuple[str, ...]
    ) -> None:
        bench.write(make_texts(60)).enrich(limit=20)
        bench.server.faults.shares = {fault: 1.0}
        if more:
            bench.server.faults.drips_everywhere = fault
        process = bench.process(*more)
        bench.wait_in_flight()  # before that, a signal that the test's own parent ignores is ignored here, too
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - started < 10
        assert process.returncode == 130
        assert "Stopped: 20 of 60 rows are labelled and saved" in errors
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from there")
class TestMemory:
    @pytest.mark.parametrize("fault", ["endless", "bomb"])
    def test_a_reply_is_read_only_so_far(self, bench: Bench, fault: str) -> None:
        bench.server.faults.shares = {fault: 1.0}
        bench.write(make_texts(2))
        arguments = bench.arguments("--base-url", bench.server.url, "--quiet")
        run = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1
        assert int(run.stdout) < 300
        assert "reply too large" in run.stderr

    def test_a_jobs_file_is_read_as_a_stream_and_its_lines_have_a_bound(self, bench: Bench) -> None:
        """A line without end before the answers, of 300 MB."""
        bench.server.batches.long_line = 300_000_000
        bench.write(make_texts(20))
        arguments = bench.arguments("--base-url", bench.server.url, "--quiet", "--batch-api", "--poll-interval", "0.05")
        run = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) < 300
        bench.check()
        assert len(bench.server.batches.jobs) == 1


class TestReach:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    @pytest.mark.parametrize("more", [(), ("--batch-api", "--poll-interval", "0.05", "--max-retries", "0")])
    def test_a_redirect_takes_no_text_elsewhere_and_costs_nothing(
        self, bench: Bench, status: int, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with StandIn() as other:
            there = f"{other.url}/files" if more else f"{other.url}/chat/completions"
            bench.server.script.extend([(status, {"location": there}, {})] * 3)
            assert bench.write(make_texts(30)).command(*more) == 1
            assert other.arrived == 0
        errors = capsys.readouterr().err
        assert (
            f"redirects to {other.url.removesuffix('/v1')}; texts are only sent to --base-url: pass the final" in errors
        )
        bench.check(blank_rows=range(30))
        with module.Store(bench.store) as store:
            assert store.money() == (0, 0)

    def test_a_redirect_within_the_server_is_named_too(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.faults.redirect_to = "/v1/chat/completions"
        bench.server.faults.shares = {"redirect": 1.0}
        assert bench.write(make_texts(30)).command() == 1
        assert "redirects to '/v1/chat/completions'; texts are only sent to --base-url" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("HTTPS_PROXY", "http://[::1"),
            ("ALL_PROXY", "ftp://127.0.0.1:9"),
            ("SSL_CERT_FILE", "/nowhere/certificates.pem"),
        ],
    )
    def test_an_environment_that_cannot_be_used_is_one_line_and_leaves_nothing(
        self,
        bench: Bench,
        variable: str,
        value: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv(variable, value)
        bench.write(["cake"])
        assert module.main(bench.arguments("--base-url", "https://localhost.example/v1")) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("Error: No connection can be set up (")
        assert variable in errors.partition("these variables of the environment: ")[2]
        assert errors.count("\n") == 1
        assert [path.name for path in bench.input.parent.iterdir()] == ["in.csv"]

    @pytest.mark.parametrize("url", ["http://[::1", "http://host:99999/v1", "http://", "http://a b/v1"])
    def test_an_address_that_is_no_url(self, bench: Bench, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert module.main(bench.write(["cake"]).arguments("--base-url", url)) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert [path.name for path in bench.input.parent.iterdir()] == ["in.csv"]


@pytest.mark.every_form
class TestCaches:
    def test_a_gateway_that_answers_from_a_cache_of_other_requests_ends_the_run(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.faults.shares = {"cache": 1.0}
        assert bench.write(make_texts(100)).command("--max-workers", "1") == 1
        assert "returned a cached reply to a different request: disable the gateway's cache" in capsys.readouterr().err
        bench.check(blank_rows=range(10, 100))
        bench.server.faults.shares = {}
        bench.enrich()
        bench.check()

    @pytest.mark.parametrize("batch_size", [451, 500])
    def test_a_cache_is_noticed_whatever_the_size_of_a_batch(self, bench: Bench, batch_size: int) -> None:
        bench.server.faults.shares = {"cache": 1.0}
        texts = [f"{'violence' if number < batch_size else 'cake'} {number}" for number in range(2 * batch_size)]
        assert bench.write(texts).command("--max-workers", "1", "--batch-size", str(batch_size)) == 1
        bench.check(blank_rows=range(batch_size, 2 * batch_size))

    def test_alike_replies_of_a_server_that_numbers_them_by_the_second_are_believed_after_two(
        self, bench: Bench
    ) -> None:
        bench.server.model.odd_reply = {"id": "chatcmpl-1763", "created": 1763, "model": "m"}
        bench.write([f"tram {number}" for number in range(100)]).enrich(max_workers=1)
        bench.check()
        assert len(bench.server.calls) == 10 + module.MAX_FALSE_ALARMS

    def test_a_healthy_server_costs_no_extra_call(self, bench: Bench) -> None:
        bench.write([f"tram {number}" for number in range(100)]).enrich()
        assert len(bench.server.calls) == 10


class TestDisk:
    def test_a_store_that_cannot_be_written_stops_the_run_at_once(self, bench: Bench) -> None:
        bench.write(make_texts(200)).enrich(limit=20)
        with contextlib.closing(sqlite3.connect(bench.store)) as db:
            db.execute("CREATE TRIGGER full BEFORE INSERT ON attempts BEGIN SELECT raise(ABORT, 'disk full'); END")
        with pytest.raises(module.EnrichmentError, match=r"The store .* failed"):
            bench.enrich(max_workers=1)
        assert len(bench.server.calls) <= 2 + 2
        assert len([cells for cells in bench.cells if "" not in cells]) == 20

    def test_a_read_only_store_is_told_as_that(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(["cake"]).enrich()
        bench.store.chmod(0o400)
        assert bench.command() == 2
        assert "is read-only: allow writing to it and to its folder." in capsys.readouterr().err


class TestTables:
    def test_excels_first_line_names_the_delimiter_and_is_kept(self, bench: Bench) -> None:
        for mark in ("", "\ufeff"):
            bench.input.write_text(f"{mark}sep=;\r\ntext;a,b\r\ncake, and more;1\r\n", encoding="utf-8", newline="")
            frame = bench.enrich(overwrite=True)
            expected = f"{mark}sep=;\r\ntext;a,b;{';'.join(LABELS)}\r\ncake, and more;1;0;0;0\r\n"
            assert bench.output.read_bytes().decode() == expected
            assert list(frame.columns) == ["text", "a,b", *LABELS]

    @pytest.mark.parametrize("content", ['text,"note;"\nhello,1\n', 'text,"a|"\nhello,1\n', "sep=,text\r\nx,hello\r\n"])
    def test_a_header_that_looks_odd_by_another_delimiter_is_read(self, bench: Bench, content: str) -> None:
        bench.input.write_text(content, newline="")
        assert len(bench.enrich()) == 1

    @pytest.mark.parametrize("content", ["text;id\na;1\nb\n", 'text;id\na;1\n"b;1"2"\n'])
    def test_its_lines_are_counted_from_that_one(self, bench: Bench, content: str) -> None:
        bench.input.write_text(f"sep=;\n{content}", encoding="utf-8", newline="")
        with pytest.raises(module.InputError, match="line 4"):
            bench.enrich()

    @pytest.mark.parametrize("encoding", ["utf-32", "utf-32-le", "utf-32-be"])
    def test_utf_32_is_refused(self, bench: Bench, encoding: str) -> None:
        bench.input.write_bytes("\ufefftext\ncake\n".encode(encoding))
        with pytest.raises(module.InputError, match="is UTF-32: save it as UTF-8 CSV"):
            bench.enrich()
        assert bench.server.calls == []

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
    def test_a_doubled_byte_order_mark_is_read(self, bench: Bench, encoding: str) -> None:
        content = "\ufeff\ufefftext,id\ncake,1\n"
        bench.input.write_bytes(content.encode(encoding))
        bench.enrich(["a label"])
        assert bench.output.read_bytes().decode(encoding) == content.replace("id\n", "id,a label\n").replace(
            "1\n", "1,0\n"
        )


@pytest.mark.every_form
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

    @pytest.mark.one_form
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

    @pytest.mark.one_form
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

    @pytest.mark.one_form
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

    @pytest.mark.one_form
    def test_a_413_to_a_poll_is_one_line(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.batches.looks.append((413, {}, error_body("too large")))
        assert bench.write(make_texts(20)).command("--batch-api", "--poll-interval", "0.05") == 1
        errors = capsys.readouterr().err
        assert "rejects uploads of this size (HTTP 413)" in errors
        assert "unexpected" not in errors
        assert bench.command("--batch-api", "--poll-interval", "0.05") == 0
        bench.check()

    @pytest.mark.one_form
    def test_a_list_as_the_reply_to_an_upload_ends_the_run(self, bench: Bench) -> None:
        bench.server.script.append((200, {}, ["x"]))
        with pytest.raises(module.ProviderError, match=r"fails \(HTTP 200\): run the same command later"):
            bench.write(make_texts(20)).enrich(**FAST)
        bench.enrich(**FAST)
        bench.check()

    @pytest.mark.parametrize("kind", ["error-first", "nested"])
    def test_odd_lines(self, bench: Bench, kind: str) -> None:
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

    @pytest.mark.parametrize(
        "errors", ["the queue is gone", ["the queue is gone"], {"data": "the queue is gone"}, None]
    )
    def test_a_failed_job_is_told_whatever_form_its_errors_have(self, bench: Bench, errors: Any) -> None:
        bench.server.batches.odd_fields = {"status": "failed", "output_file_id": None, "errors": errors}
        told = "the queue is gone" if errors and "data" not in errors else ""
        with pytest.raises(module.ProviderError, match=f"rejected job batch_1: .*{told}"):
            bench.write(make_texts(20)).enrich(**FAST)

    def test_leaving_without_a_store_is_refused(self, server: StandIn) -> None:
        import pandas as pd

        with pytest.raises(
            module.InputError, match="no_wait needs a store, or the results could not be collected later"
        ):
            module.enrich_dataframe(
                pd.DataFrame({"text": ["a"]}), "text", LABELS, base_url=server.url, use_batch_api=True, no_wait=True
            )
        assert not server.batches.files


TEXT = 'Nobody "must" read this Sentence;\nnot even a part'
QUOTES = {
    "whole": TEXT,
    "escaped": json.dumps(TEXT),
    "escaped twice": json.dumps(json.dumps(TEXT)),
    "upper case": TEXT.upper(),
    "from its middle": TEXT[12:],
    "with signs": "-".join(TEXT),
    "as code points": "".join(f"\\u{ord(sign):04x}" for sign in TEXT),
}


class TestQuotes:
    @pytest.mark.parametrize("name", QUOTES)
    @pytest.mark.parametrize("more", [(), ("--batch-api",)])
    def test_what_a_server_says_is_left_out_where_it_repeats_a_text(
        self, bench: Bench, name: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        body = error_body(f"Cannot take: {QUOTES[name]}", code="bad_words", kind="invalid")
        bench.server.script.extend([(403, {}, body)] * 20)
        assert bench.write([TEXT, "cake"]).command(*more) == 1
        errors = capsys.readouterr().err
        assert "Server message: bad_words invalid: (left out, since it repeats a part of what was sent)" in errors
        assert "nobody" not in re.sub(r"[^a-z]", "", errors.casefold())

    def test_else_it_is_told(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.script.extend([(403, {}, error_body("Your project is archived.", code="archived"))] * 20)
        assert bench.write([TEXT]).command() == 1
        assert "Server message: archived invalid_request_error: Your project is archived." in capsys.readouterr().err

    @pytest.mark.parametrize("kind", ["jobs", "labels", "creation"])
    def test_a_refused_job_or_label_is_not_quoted_either(
        self, bench: Bench, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = "Nobody should read this Sentence"
        words = f"Cannot take: {text.upper()}"
        if kind == "jobs":
            bench.server.batches.plans.append({"error": {"code": "bad", "message": words, "line": 1}})
            code = bench.write([text, "cake"]).command("--batch-api", "--poll-interval", "0.05")
        elif kind == "creation":
            bench.server.script.extend([None, (403, {}, error_body(words, code="bad"))])
            code = bench.write([text, "cake"]).command("--batch-api")
        else:
            bench.input.write_text(f"text,label\ncake,{text}\n")
            bench.server.script.extend([(403, {}, error_body(words, code="bad"))] * 20)
            code = bench.command("--label-column", "label")
        assert code == 1
        errors = capsys.readouterr().err
        assert "nobody" not in errors.casefold()
        assert "(left out, since it repeats a part of what was sent)" in errors

    @pytest.mark.parametrize(
        ("body", "words"), [({"detail": "Not on Sundays."}, "Server message: Not on Sundays."), ({}, "")]
    )
    def test_what_other_servers_call_the_message_is_told_and_nothing_else(
        self, bench: Bench, body: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.script.append((401, {}, body))
        assert bench.write(["cake"]).command() == 1
        errors = capsys.readouterr().err
        assert words in errors
        assert ("Server message" in errors) == bool(words)

    def test_the_param_that_a_server_names_is_told(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.server.script.extend([(403, {}, error_body("No.", code="archived", param="metadata.team"))] * 20)
        assert bench.write(["cake"]).command() == 1
        assert "metadata.team" in capsys.readouterr().err


class TestPython:
    def test_numbers_of_numpy_and_odd_columns(self, server: StandIn) -> None:
        import numpy as np
        import pandas as pd

        frame = pd.DataFrame({"text": ["an attack"], 1: [5]})
        labelled = module.enrich_dataframe(
            frame, "text", ["1", "attack"], base_url=server.url, batch_size=np.int64(5), timeout=np.float32(60)
        )
        assert list(labelled.columns) == ["text", 1, "1", "attack"]
        assert labelled["attack"].tolist() == [1]
        for column in ("text", "label"):
            odd = pd.DataFrame({"text": ["a"], "label": ["b"]}).astype(object)
            odd.at[0, column] = ["a", "list"]
            with pytest.raises(module.InputError, match=f"Row 0 of the column '{column}' holds a list: make it a text"):
                module.enrich_dataframe(odd, "text", ["x"], label_column="label", base_url=server.url)

    def test_what_pandas_copies_at_each_operation_stays_small(self, server: StandIn) -> None:
        import pandas as pd

        frame = pd.DataFrame({"text": [f"text {number} poison-garbage" for number in range(300)]})
        told = module.enrich_dataframe(frame, "text", ["x"], base_url=server.url, batch_size=100).attrs["enrichment"]
        assert told["blank_row_count"] == 300
        assert len(told["blank_rows"]) == module.ATTRIBUTE_ROWS == 100

    def test_a_program_whose_signal_handler_is_not_pythons_gets_it_back(self, bench: Bench) -> None:
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
