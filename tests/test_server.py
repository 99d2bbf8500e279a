"""Server: where calls go, what their replies hold, cost and say, and what is not said again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, PEAK, ROOT, Bench, make_row, make_texts, price, prompt_of, run_figures
from stand_in_rules import error_body
from stand_in_server import Call, StandIn

import enrich_dataset as module


def test_another_server_than_openais_needs_no_key(bench: Bench) -> None:
    bench.server.gate.key = "none"
    assert bench.write(["cake"]).command("--quiet") == 0


class TestBills:
    def test_the_cost_is_the_list_price_of_each_call(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        told = run_figures(bench.write(make_texts(60)).enrich(quiet=False))
        assert told["cost"] == pytest.approx(price(bench.server.calls))
        assert told["tokens"]["prompt"] == sum(call.prompt_tokens for call in bench.server.calls)
        assert told["tokens"]["completion"] == sum(call.completion_tokens for call in bench.server.calls)
        printed, errors = capsys.readouterr()
        assert f"Cost: {module.dollars(told['cost'])} (what OpenAI would bill)\n" in printed
        assert f"Tokens: {told['tokens']['prompt']:,} in, {told['tokens']['completion']:,} out\n" in printed
        assert re.search(rf"6/6 .* rows/s, \{module.dollars(told['cost'])}\]", errors)

    def test_a_price_that_nobody_knows_is_said_to_be_unknown(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = run_figures(bench.write(["cake"]).enrich(model="llama3.2", quiet=False))
        assert told["cost"] is None
        assert told["tokens"]["prompt"] > 0
        assert "Cost: unknown: no price of 'llama3.2' is known (pass price)" in capsys.readouterr().out

    def test_a_reply_is_priced_as_the_model_that_answered(self, bench: Bench) -> None:
        completion = {"choices": [{"message": {"content": '{"660": []}'}}], "model": "gpt-4.1-2025-04-14"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 1000}
        bench.server.script.append((200, {}, completion | {"usage": usage}))
        assert run_figures(bench.write(["tram"]).enrich())["cost"] == pytest.approx((1000 * 2 + 1000 * 8) / 1e6)

    # Shapes of usage: Azure Foundry's, xAI's, Gemini's, one of -1s, and one that makes no sense at all.
    @pytest.mark.parametrize(
        ("usage", "tokens"),
        [
            (
                {"completion_tokens": 9, "total_tokens": 87, "prompt_tokens_details": {"cached_tokens": 158}},
                (78, 78, 9),
            ),
            (
                {"completion_tokens": 1, "total_tokens": 161, "completion_tokens_details": {"reasoning_tokens": 82}},
                (78, 0, 83),
            ),
            ({"completion_tokens": 60, "total_tokens": 1638}, (78, 0, 1560)),
            ({"completion_tokens": -1, "total_tokens": -1, "prompt_tokens_details": {"cached_tokens": -1}}, (78, 0, 0)),
            (
                {"completion_tokens": 9, "total_tokens": 9**30, "prompt_tokens_details": {"cached_tokens": "x"}},
                (78, 0, 9),
            ),
        ],
    )
    def test_reasoning_tokens_that_are_billed_beside_the_completion_are_counted(
        self, bench: Bench, usage: Any, tokens: tuple[int, ...]
    ) -> None:
        body = {"choices": [{"message": {"content": '{"660": []}'}}], "usage": {"prompt_tokens": 78} | usage}
        bench.server.script.append((200, {}, body))
        told = run_figures(bench.write(["tram"]).enrich())
        prompt, cached, completion = tokens
        assert (told["tokens"]["prompt"], told["tokens"]["cached"], told["tokens"]["completion"]) == tokens
        assert told["cost"] == pytest.approx(((prompt - cached) * 0.15 + cached * 0.075 + completion * 0.60) / 1e6)

    @pytest.mark.parametrize(
        ("bill", "dollars"),
        [
            ({"cost": 0.000241}, 0.000241),  # OpenRouter
            ({"cost": {"request_cost": 0.005, "total_cost": 0.00502}}, 0.00502),  # Perplexity
            ({"cost_in_usd_ticks": 2_087_200}, 0.00020872),  # xAI
            ({"cost": -1}, None),
            ({"cost": "free"}, None),
        ],
    )
    def test_a_bill_in_the_reply_counts_where_no_list_has_the_price(
        self, bench: Bench, bill: Any, dollars: float | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        usage = {"prompt_tokens": 78, "completion_tokens": 9} | bill
        body = {"choices": [{"message": {"content": '{"660": []}'}}], "usage": usage}
        bench.server.script.extend([(200, {}, body)] * 2)
        assert run_figures(bench.write(["tram"]).enrich(model="nobodys-model", quiet=False))["cost"] == dollars
        shown = "unknown" if dollars is None else rf"\{module.dollars(dollars)} "
        assert re.search(f"Cost: {shown}", capsys.readouterr().out)
        listed = run_figures(bench.enrich(fresh=True))["cost"]
        assert listed == pytest.approx((78 * 0.15 + 9 * 0.60) / 1e6)

    def test_the_users_own_price_stands(self, bench: Bench) -> None:
        told = run_figures(bench.write(["cake"]).enrich(model="llama3.2", price=(10, 20)))
        assert told["cost"] == pytest.approx(price(bench.server.calls, 10, 20))

    @pytest.mark.parametrize(
        ("asked", "served", "into", "out"),
        [
            ("flex", "flex", 0.125, 1.0),
            ("flex", "default", 0.25, 2.0),  # without capacity, it is served and billed as usual
            ("priority", "priority", 0.45, 3.6),
            ("auto", "priority", 0.45, 3.6),  # by the project's own setting
            ("priority", None, 0.45, 3.6),
        ],
    )
    def test_a_service_tier_is_billed_at_its_own_price(
        self, bench: Bench, asked: str, served: str | None, into: float, out: float
    ) -> None:
        """The list prices of gpt-5-mini, November 2026; the reply names the tier that was used (OpenAI, flex guide)."""
        bench.server.model.odd_reply = {"service_tier": served} if served else {}
        told = run_figures(bench.write(make_texts(20)).enrich(model="gpt-5-mini", extra_body={"service_tier": asked}))
        assert told["cost"] == pytest.approx(price(bench.server.calls, into, out))

    def test_a_cap_and_an_estimate_go_by_the_tier_that_is_asked_for(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = []
        for tier in ("default", "priority"):
            options = ("--model", "gpt-5-mini", "--extra-body", json.dumps({"service_tier": tier}))
            assert bench.write(make_texts(20)).command("--dry-run", *options) == 0
            found += re.findall(r"Estimated cost: about \$([\d.]+)", capsys.readouterr().out)
        assert float(found[1]) == pytest.approx(1.8 * float(found[0]), rel=0.01)

    def test_a_price_is_two_numbers_none_below_0(self, bench: Bench) -> None:
        for wrong, words in (((1,), "must be 2 numbers"), ((1, -1), "price must be at least 0")):
            with pytest.raises(module.InputError, match=words):
                bench.write(["cake"]).enrich(price=wrong)

    def test_what_earlier_runs_cost_is_told_too(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(make_texts(20)).enrich(limit=10)
        bench.enrich(quiet=False)
        total = re.findall(r"\(what OpenAI would bill, all runs on this store: \$([\d.]+)\)", capsys.readouterr().out)
        assert float(total[0]) == pytest.approx(price(bench.server.calls), abs=1e-6)

    def test_rows_that_were_known_are_counted_as_reused(self, bench: Bench) -> None:
        bench.write([*make_texts(20), ""]).enrich(limit=5)
        assert run_figures(bench.enrich())["reused_rows"] == 5
        assert run_figures(bench.enrich())["reused_rows"] == 20

    def test_cached_and_reasoning_tokens_are_told(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        usage = {"prompt_tokens": 2_000_000, "completion_tokens": 1_000_000}
        usage |= {"prompt_tokens_details": {"cached_tokens": 1_000_000}}
        usage |= {"completion_tokens_details": {"reasoning_tokens": 5}}
        body = {"choices": [{"message": {"content": '{"660": []}'}}], "usage": usage}
        bench.server.script.append((200, {}, body))
        assert bench.write(["tram"]).command() == 0
        told = "2,000,000 in (1,000,000 of them cached), 1,000,000 out (5 of them reasoning)"
        assert f"✓ Tokens: {told}\n" in capsys.readouterr().out

    def test_the_tokens_of_an_answer_that_was_cut_off_count_beside_those_of_the_next(self, bench: Bench) -> None:
        cut_off = {"message": {"content": "{"}, "finish_reason": "length"}
        usage = {"prompt_tokens": 100, "completion_tokens": 500}
        bench.server.script.append((200, {}, {"choices": [cut_off], "usage": usage}))
        tokens = run_figures(bench.write(["tram"]).enrich())["tokens"]
        (answered,) = [call for call in bench.server.calls if call.prompt_tokens and call.texts][-1:]
        assert tokens["prompt"] == 100 + answered.prompt_tokens
        assert tokens["completion"] == 500 + answered.completion_tokens

    def test_a_reply_without_usage_is_counted_at_its_worst(self, bench: Bench) -> None:
        body = {"choices": [{"message": {"content": '{"660": []}'}}]}
        bench.server.script.append((200, {}, body))
        bench.write(["tram"]).enrich()
        with module.Store(bench.store) as store:
            cost, unseen = store.db.execute("SELECT cost, unconfirmed_cost FROM attempts").fetchone()
        assert cost is None
        assert unseen > price([Call(0, 0, 200, "", (), (), {}, 300, 20)])


def test_an_unknown_model_is_told_with_what_to_pass(bench: Bench) -> None:
    bench.server.gate.models = {"gpt-6-luna"}
    with pytest.raises(module.ProviderError, match=r"pass another model \(at OpenAI gpt-6-luna\)"):
        bench.write(["cake"]).enrich()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from there")
@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_an_endless_reply_and_a_gzip_bomb_are_read_up_to_the_size_limit(bench: Bench, fault: str) -> None:
    bench.server.faults.shares = {fault: 1.0}
    bench.write(make_texts(2))
    arguments = bench.arguments("--base-url", bench.server.url, "--quiet", "--max-retries", "0")
    run = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert int(run.stdout) < 300
    assert "reply too large" in run.stderr


@pytest.mark.parametrize(
    ("status", "inside", "right"), [(400, 429, 400), (404, 500, 404), (200, 502, 502), (200, 0, 200), (0, 503, 0)]
)
def test_the_status_of_an_error_inside_a_reply_counts_only_where_http_says_success(
    status: int, inside: int, right: int
) -> None:
    assert module.Reply(status, {}, error_body("no", code=inside), 0.0).error_status == right


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "total_tokens"])
def test_a_usage_beyond_all_reason_is_none_and_leaves_the_store_usable(bench: Bench, name: str) -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 5, "total_tokens": 55} | {name: 2**62}
    bench.server.model.odd_reply = {"usage": usage}
    told = run_figures(bench.write(make_texts(20)).enrich(batch_size=5))
    bench.check()
    assert told["tokens"]["prompt"] < 10_000
    assert run_figures(bench.enrich())["reused_rows"] == 20


class TestAddresses:
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
    def test_an_address_that_is_no_url_is_refused_in_one_line(
        self, bench: Bench, url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert module.main(bench.write(["cake"]).arguments("--base-url", url)) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert [path.name for path in bench.input.parent.iterdir()] == ["in.csv"]


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

    def test_a_servers_message_without_any_text_is_shown(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
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


@pytest.mark.parametrize("has_date", [True, False])
def test_a_date_to_retry_after_is_read_by_the_servers_clock_or_else_by_ours(bench: Bench, has_date: bool) -> None:
    server_time = datetime.now(UTC) - timedelta(hours=3) * has_date
    headers = {"retry-after": format_datetime(server_time + timedelta(seconds=30), usegmt=True)}
    headers["date"] = format_datetime(server_time, usegmt=True) if has_date else ""
    bench.server.script.append((429, headers, {}))
    options = module.frame_options(pd.DataFrame(), "text", LABELS, base_url=bench.server.url)
    server = module.Server(options, module.Timing())
    prompt, row = prompt_of(), make_row("cake")
    with server.connect():
        reply = server.chat(module.build_body(module.Attempt((row,), prompt), server.default_parameters))
    assert module.requested_wait(reply) == pytest.approx(30, abs=1.5)


@pytest.mark.parametrize(("first", "seconds"), [("0", 2.0), ("1500", 1.5)])
def test_retry_after_ms_counts_before_retry_after_unless_it_is_0(first: str, seconds: float) -> None:
    reply = module.Reply(429, {"retry-after-ms": first, "retry-after": "2"}, {}, 0.0)
    assert module.requested_wait(reply) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_wait_that_headers_ask_for_is_read(headers: dict[str, str], seconds: float) -> None:
    assert module.requested_wait(module.Reply(429, headers, None, 0.0)) == seconds


def test_a_wait_until_a_date_is_read() -> None:
    now = formatdate(time.time() + 9_999, usegmt=True)  # by the server's clock
    headers = {"retry-after": formatdate(time.time() + 10_059, usegmt=True), "date": now}
    assert module.requested_wait(module.Reply(429, headers, None, 0.0)) == 60


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("Rate limit reached on tokens per min (TPM). Please try again in 18.642s. Visit", 18.642),  # OpenAI
        ("Please try again in 5m45.6s.", 345.6),  # Groq
        ("Rate limit is exceeded. Try again in 2 seconds.", 2),  # Azure
        ("Please retry in 1 minute 30 seconds", 90),
        ("Please retry shortly, or add your own key", 0),  # OpenRouter
    ],
)
def test_the_wait_that_a_message_asks_for_is_read(words: str, seconds: float) -> None:
    assert module.requested_wait(module.Reply(429, {}, error_body(words), 0.0)) == pytest.approx(seconds)


# Errors as servers place them, and what of them the user should read.
ERRORS: list[tuple[Any, int, str]] = [
    ([{"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}], 400, "API key not valid."),
    ({"error": "Model not found", "code": "invalid-argument"}, 0, "Model not found"),
    ({"choices": [{"message": {}, "error": {"code": 502, "message": "Upstream error"}}]}, 502, "Upstream error"),
    ({"error": {"code": 400, "message": "Provider returned error", "metadata": {"raw": "bad schema"}}}, 400, "Provider returned error bad schema"),
    ({"detail": "Invalid API Key"}, 0, "Invalid API Key"),
    ({"detail": [{"loc": ["body", "x"], "msg": "Extra inputs"}]}, 0, '[{"loc":["body","x"],"msg":"Extra inputs"}]'),
    ({"object": "error", "message": "not supported by xgrammar", "code": 400}, 400, "not supported by xgrammar"),
    ("Failed to deserialize", 0, "Failed to deserialize"),
    ("<html><head><title>x</title></head><body><h1>502</h1> Bad gateway</body></html>", 0, "502 Bad gateway"),
    ({"choices": [{"message": {"content": "x"}}], "usage": {}}, 0, ""),
    (None, 0, ""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message"), ERRORS)
def test_an_error_is_found_wherever_it_stands(body: Any, status: int, message: str) -> None:
    found = module.find_error(body)
    assert (found.status, found.message) == (status, message)


STREAM = (
    b'data: {"id": "x", "choices": [{"index": 0, "delta": {"content": "{\\"660\\""}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": ": []}"}, "finish_reason": "stop"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


def test_a_stream_of_events_is_read_as_the_completion_that_it_is() -> None:
    body = module.parse_body(STREAM)
    assert body["choices"][0] == {"message": {"content": '{"660": []}'}, "finish_reason": "stop"}
    assert body["usage"]["prompt_tokens"] == 5
    assert module.parse_body(b'{"choices": []}\n\ndata: [DONE]\n') == {"choices": []}
    assert module.parse_body(b"<html>") == "<html>"


def test_a_server_is_quoted_without_key_or_text(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(["a text that nobody should see in a log"])
    message = "Input 'a text that nobody should see' with key my-own-key is bad"
    bench.server.script.extend([(403, {}, error_body(message))] * 40)
    assert bench.command("--api-key", "my-own-key") == 1
    assert "nobody" not in capsys.readouterr().err
    options = module.Options(bench.input, bench.output, "text", None, LABELS, api_key="my-own-key")
    words = "bad key my-own-key sk-abc***d and  more"
    quoted = module.Server(options, module.Timing()).quote(words, [make_row("text")])
    assert quoted == "bad key [key] [key] and more"
    nobodys = module.Server(
        module.Options(bench.input, bench.output, "text", None, LABELS, base_url=bench.server.url), module.Timing()
    )
    assert nobodys.quote("none of these", []) == "none of these"


def test_a_proxy_is_not_asked_for_this_machine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    bench.write(["cake"]).enrich()
    bench.check()


def test_a_socks_proxy_without_its_package_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(module.InputError, match="pip install socksio"):
        bench.write(["cake"]).enrich(base_url="http://example.invalid/v1", api_key="x")
