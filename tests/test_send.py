"""Requests -> replies: limits are paced, faults retried, dialects learned, and pointless jobs stopped."""

from __future__ import annotations

import json
import socket
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, Bench, make_row, make_texts, prompt_of
from hypothesis import given
from hypothesis import strategies as st
from stand_in_rules import error_body
from test_cost import price

import enrich_dataset as module

TRANSPORT_FAULTS = ["500", "503", "reset", "cut", "html", "empty"]


@pytest.fixture
def quick(bench: Bench) -> None:
    """Waits a fiftieth as long."""
    bench.timing = module.Timing(jitter=lambda: 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
@pytest.mark.every_form
def test_a_fault_on_the_way_is_retried(bench: Bench, fault: str) -> None:
    bench.server.faults.shares = {fault: 0.3}
    bench.write(make_texts(60)).enrich(batch_size=3)
    bench.check()
    assert any(call.fault == fault for call in bench.server.calls)


@pytest.mark.usefixtures("quick")
@pytest.mark.every_form
def test_a_storm_of_all_faults_leaves_right_cells_and_only_the_poisoned_rows_blank(bench: Bench) -> None:
    from stand_in_model import FAULTS

    bench.server.faults.shares = dict.fromkeys(FAULTS, 0.02)
    texts = make_texts(400)
    texts[7], texts[205], texts[399] = "poison-filter", "poison-refusal", "poison-garbage"
    assert bench.write(texts).command("--quiet", "--max-workers", "8") == 3
    bench.check(blank_rows=[7, 205, 399])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
@pytest.mark.every_form
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
    assert 5 <= len(bench.server.calls) + bench.server.in_flight <= 5 + 5  # and the probe's
    bench.server.model.first_token = 0.0
    bench.enrich(timeout=5)
    bench.check()


# --- Limits


def test_rate_limits_alone_leave_no_row_blank(bench: Bench) -> None:
    bench.server.faults.shares = {"429": 0.3}
    bench.write(make_texts(60)).enrich(max_retries=0, batch_size=10, max_workers=2)
    bench.check()


@pytest.mark.parametrize(("kind", "per_minute", "burst"), [("requests", 3000, 20), ("tokens", 400_000, 6000)])
def test_a_limit_that_is_told_is_kept_before_it_refuses(bench: Bench, kind: str, per_minute: int, burst: int) -> None:
    bench.server.limits.set(kind, per_minute, burst)
    bench.write(make_texts(200)).enrich(batch_size=1, max_workers=8)
    bench.check()
    refused = sum(call.status == 429 for call in bench.server.calls)
    assert refused <= 0.05 * len(bench.server.calls)


def test_all_workers_wait_as_long_as_a_429_asks(bench: Bench) -> None:
    bench.server.script.append((429, {"retry-after-ms": "700"}, error_body("slow down")))
    bench.write(make_texts(40)).enrich(max_workers=1)
    waited = bench.server.calls[1].at - bench.server.calls[0].at
    assert 0.65 < waited < 1.5
    bench.check()


def test_a_long_wait_is_told_and_can_be_interrupted(bench: Bench) -> None:
    bench.server.script.append((429, {"retry-after": "3000"}, error_body("slow down")))
    process = bench.write(make_texts(10)).process()
    started = time.monotonic()
    while not bench.server.calls and time.monotonic() < started + 20:
        time.sleep(0.02)
    time.sleep(0.3)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Rate limit: all workers wait 3000 s." in errors


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
def test_what_a_server_asks_to_wait(headers: dict[str, str], seconds: float) -> None:
    assert module.requested_wait(module.Reply(429, headers, None, 0.0)) == seconds


def test_a_server_may_ask_to_wait_until_a_date() -> None:
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
def test_what_a_servers_words_ask_to_wait(words: str, seconds: float) -> None:
    assert module.requested_wait(module.Reply(429, {}, error_body(words), 0.0)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("4ms", 0.004), ("8.64s", 8.64), ("7m12s", 432), ("2s81ms", 2.081), ("5h50m30ms", 21_000.03), ("1d", 86_400), ("", 0)],
)  # fmt: skip
def test_durations_of_rate_limit_headers(duration: str, seconds: float) -> None:
    assert module.seconds_of(duration) == pytest.approx(seconds)


def told(limit: float, remaining: float, reset: str, name: str = "requests") -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": reset,
    }


@pytest.mark.parametrize(
    "headers", [{}, told(0, 0, "1s"), told(-1, -1, ""), told(60, 61, "1s"), {"x-ratelimit-limit-requests": "many"}]
)
def test_limits_that_say_nothing_are_not_believed(headers: dict[str, str]) -> None:
    assert module.rate_limits(headers) == {}


def test_capacity_level_and_refill_are_learned() -> None:
    limiter = module.Pace(8, module.Timing())
    ticket = limiter.note_start(100, now=0.0)
    limiter.note_headers(told(600, 0, "60s") | told(1000, 500, "30s", "project-tokens"), ticket, now=0.0)
    assert limiter.buckets["requests"].rate == pytest.approx(10)
    assert limiter.delay(100, now=0.0) == pytest.approx(0.2)  # two calls' worth
    assert limiter.delay(400, now=0.0) == pytest.approx((800 - 500) / (500 / 30))
    assert limiter.delay(9000, now=100.0) <= 0  # more than the bucket holds: it must do with all


def test_a_daily_limit_is_not_taken_for_one_a_minute() -> None:
    assert module.rate_limits(told(10_000, 9_999, "8.64s")) == {"requests": (10_000, 9_999, 8.64)}
    limiter = module.Pace(8, module.Timing())
    limiter.note_headers(told(10_000, 9_999, "8.64s"), limiter.note_start(1, 0.0), 0.0)
    assert limiter.buckets["requests"].rate == pytest.approx(10_000 / 86_400)


def test_what_a_server_told_holds_calls_up_for_a_minute_at_most() -> None:
    limiter = module.Pace(8, module.Timing())
    limiter.note_headers(told(60, 0, "24h"), limiter.note_start(1, 0.0), 0.0)
    assert limiter.delay(1, 10.0) == pytest.approx(50)
    assert limiter.delay(1, 60.0) <= 0
    limiter.note_start(1, 60.0)
    assert limiter.delay(1, 60.0) == pytest.approx(60)


def test_an_older_reply_teaches_nothing() -> None:
    limiter = module.Pace(8, module.Timing())
    early, late = limiter.note_start(1, 0.0), limiter.note_start(1, 1.0)
    limiter.note_headers(told(600, 500, "10s"), late, 2.0)
    limiter.note_headers(told(600, 0, "60s"), early, 2.0)
    assert limiter.buckets["requests"].level_at(2.0) == pytest.approx(510)


def test_refusals_in_a_row_wait_longer_and_a_minute_at_most() -> None:
    limiter = module.Pace(8, module.Timing(jitter=lambda: 1.0))
    now, waits = 0.0, []
    for _ in range(9):
        ticket = limiter.note_start(1, now)
        limiter.note_rate_limit(0.0, ticket, now)
        waits.append(limiter.resume_at - now)
        now = limiter.resume_at
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert limiter.slots == 1
    limiter.note_success()
    limiter.note_rate_limit(0.0, limiter.note_start(1, now), now)
    assert limiter.resume_at == now + 0.5


def test_refusals_of_calls_that_left_together_count_once() -> None:
    limiter = module.Pace(8, module.Timing(jitter=lambda: 1.0))
    tickets = [limiter.note_start(1, 0.0) for _ in range(8)]
    for ticket in tickets:
        limiter.note_rate_limit(0.0, ticket, 1.0)
    assert limiter.refusals == 1
    assert limiter.resume_at == 1.5


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 50)), min_size=1, max_size=200))
def test_the_pace_never_passes_a_known_limit(calls: list[tuple[float, int]]) -> None:
    """Whatever calls come when, a bucket that is told exactly is never overdrawn."""
    limiter, level, now, at = module.Pace(4, module.Timing()), 100.0, 0.0, 0.0
    for pause, tokens in calls:
        now += pause
        now += max(0.0, limiter.delay(tokens, now)) + 1e-9
        level = min(100.0, level + (now - at) * 10)
        at = now
        ticket = limiter.note_start(tokens, now)
        level -= tokens
        assert level > -1e-3
        limiter.note_headers(told(100, max(level, 0), f"{(100 - level) / 10}s", "tokens"), ticket, now)


# --- Dialects


def test_a_bound_that_is_too_large_for_the_model_is_kept_and_the_batch_is_split(bench: Bench) -> None:
    bench.server.gate.most_completion = 200
    bench.write(make_texts(10)).enrich()
    bench.check()
    assert [call.status for call in bench.server.calls] == [400, 200, 200]
    assert all("max_completion_tokens" in call.body for call in bench.server.calls)


def test_where_no_smaller_batch_helps_the_bound_is_dropped(bench: Bench) -> None:
    """Because of the room for reasoning."""
    bench.server.gate.most_completion, bench.server.gate.refuses = 4096, {"reasoning_effort"}
    bench.write(make_texts(60)).enrich(model="gpt-5-mini", max_workers=1)
    bench.check()
    assert "max_completion_tokens" not in bench.server.calls[-1].body


@pytest.mark.parametrize(
    ("refused", "model", "lost"),
    [
        ({"temperature"}, "gpt-4o-mini", {"temperature"}),
        ({"max_completion_tokens"}, "gpt-4o-mini", {"max_completion_tokens"}),
        ({"max_completion_tokens", "max_tokens"}, "gpt-4o-mini", {"max_completion_tokens", "max_tokens"}),
        ({"reasoning_effort"}, "gpt-5-mini", {"temperature"}),
        ({"json_schema"}, "local", set()),
        ({"json_schema", "json_object"}, "local", {"response_format"}),
        ({"temperature", "max_completion_tokens", "json_schema"}, "gpt-4o-mini", {"temperature"}),
    ],
)
@pytest.mark.every_form
def test_what_a_server_refuses_is_learned_and_said_once(
    bench: Bench, refused: set[str], model: str, lost: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.server.gate.refuses = refused
    bench.write(make_texts(60))
    assert bench.command("--model", model, "--max-workers", "1") == 0
    bench.check()
    assert not lost & set(bench.server.calls[-1].body)
    refusals = [call for call in bench.server.calls if call.status == 400]
    assert 1 <= len(refusals) <= 6
    assert capsys.readouterr().err.count("rejects a parameter of the request") == 1


@pytest.mark.every_form
def test_many_workers_learn_together(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.server.gate.refuses, bench.server.model.first_token = {"temperature"}, 0.05
    bench.write(make_texts(60))
    assert bench.command("--max-workers", "6") == 0
    bench.check()
    assert capsys.readouterr().err.count("continuing with no temperature") == 1
    assert sum(call.status == 400 for call in bench.server.calls) <= 6 + 1  # and the probe's first


@pytest.mark.every_form
def test_a_schema_part_that_is_refused_is_left_out_before_the_schema_is(bench: Bench) -> None:
    bench.server.gate.refuses = {"maxItems"}
    bench.write(make_texts(20)).enrich()
    bench.check()
    last = bench.server.calls[-1].body["response_format"]
    assert last["type"] == "json_schema"
    assert "maxItems" not in str(last)


def test_models_that_reason_are_asked_not_to(bench: Bench) -> None:
    bench.write(["cake"]).enrich(model="gpt-6-luna")
    assert bench.server.calls[0].body["reasoning_effort"] == "none"
    assert bench.server.calls[0].body["temperature"] == 0


def test_a_model_without_that_choice_is_asked_for_the_least(bench: Bench) -> None:
    bench.server.gate.refuses = {"reasoning_effort"}
    bench.write(["cake"]).enrich(model="gpt-5-mini")
    body = bench.server.calls[-1].body
    assert body["reasoning_effort"] == "minimal"
    assert "temperature" not in body
    assert body["max_completion_tokens"] > module.REASONING_ROOM


@pytest.mark.parametrize(
    "message",
    [
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
        "Unsupported parameter: 'max_completion_tokens' is not supported with this model.",
        "Unrecognized request argument supplied: reasoning_effort",
        "Unsupported value: 'minimal' is not supported. reasoning.effort Supported values are: 'low', 'medium'.",
        "'response_format.type' must be 'json_schema' or 'text'",
        "Invalid schema for response_format 'labels': In context=(), 'maxItems' is not permitted.",
    ],
)
def test_each_refusal_changes_one_part_and_learning_ends(message: str) -> None:
    parameters, steps = module.default_parameters("gpt-5", is_capped=False, extra_body={}), 0
    while lower := module.fall_back(parameters, message):
        assert lower != parameters
        parameters, steps = lower, steps + 1
        assert steps < 6
    assert steps


# --- What a response means


def reply(status: int, message: str = "", code: Any = None, kind: str = "x") -> module.Reply:
    return module.Reply(status, {}, error_body(message, kind, code=code), 0.0)


def judged(answer: module.Reply, rows: int, works: bool, tmp_path: Path) -> module.Verdict:
    """The verdict on a reply to an attempt of so many rows, in a run in which something was answered, or nothing yet."""
    path = tmp_path / "in.csv"
    path.touch()
    server = module.Server(
        module.Options(path, tmp_path / "out.csv", "text", None, LABELS, api_key="k"), module.Timing()
    )
    attempt = module.Attempt(tuple(make_row(str(number)) for number in range(rows)), prompt_of())
    evidence = module.Evidence(attempt.parameters, {attempt.parameters.without_room} if works else set(), reached=True)
    return module.judge(answer, attempt, evidence, server, 0.0)


V = module.Action
ABOUT_TEXTS = (V.ADAPT, V.SPLIT, V.RETRY)  # nothing answered yet; then several rows; then a lone one
TOO_LONG = (V.SPLIT, V.SPLIT, V.GIVE_UP)
AGAIN, END = (V.RETRY,) * 3, (V.STOP,) * 3


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        (reply(401, "bad key"), END),
        (reply(402, "pay"), END),
        (reply(403, "Content violates usage guidelines."), ABOUT_TEXTS),
        (module.Reply(403, {}, "", 0.0), ABOUT_TEXTS),
        (reply(404, "no model", "model_not_found"), END),
        (reply(429, "quota", "insufficient_quota"), END),
        (reply(429, "quota", None, "insufficient_quota"), END),
        (reply(429, "spend", "project_spend_limit_exceeded"), END),
        (reply(400, "Budget has been exceeded", "400", "budget_exceeded"), END),
        (reply(429, "Your account is suspended due to insufficient balance, please recharge"), END),
        (reply(429, "Quota exceeded for metric: requests, limit: 0, model: x"), END),
        (reply(429, "Rate limit reached: requests per day"), END),
        (reply(429, "Rate limit reached: tokens per day. Please try again in 5m45.6s."), AGAIN),
        (reply(429, "You exceeded your current quota, check your billing details. Please retry in 34s"), AGAIN),
        (module.Reply(429, {"retry-after": "3700"}, {}, 0.0), END),
        (reply(429, "Rate limit reached", "rate_limit_exceeded", "tokens"), AGAIN),
        (reply(429, "None", "429"), AGAIN),
        (reply(429, "Too many tokens per minute, please wait"), AGAIN),
        (module.Reply(200, {}, {"error": {"code": 429, "message": "slow"}}, 0.0), AGAIN),
        (reply(429, "Request too large for gpt-4o", "rate_limit_exceeded", "tokens"), TOO_LONG),
        (reply(400, "This model's maximum context length is 8192 tokens."), TOO_LONG),
        (reply(400, "the request exceeds the available context size", 400, "exceed_context_size_error"), TOO_LONG),
        (reply(400, "The total length of all messages is too long."), TOO_LONG),
        (reply(413, "Payload too large"), TOO_LONG),
        (reply(400, "The response was filtered due to Azure's content management policy", "content_filter"), ABOUT_TEXTS),
        (reply(408), AGAIN),
        (reply(409), AGAIN),
        (reply(500), AGAIN),
        (reply(529), AGAIN),
        (reply(503, "overloaded", "server_is_overloaded"), AGAIN),
        (module.Reply(502, {}, "<html>Bad gateway</html>", 0.0), AGAIN),
        (module.Reply(0, {}, None, 0.0, "no answer in time"), AGAIN),
        (module.Reply(200, {}, {"choices": [{"message": {"content": ""}, "error": {"code": 502}}]}, 0.0), AGAIN),
        (module.Reply(200, {}, None, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"error": {}}, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"choices": []}, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"choices": [{"message": {}}]}, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"error": "Unexpected endpoint or method."}, 0.0), ABOUT_TEXTS),
        (module.Reply(400, {}, {"error": "a text alone"}, 0.0), ABOUT_TEXTS),
        (module.Reply(422, {}, "Failed to deserialize the JSON body", 0.0), ABOUT_TEXTS),
        (module.Reply(302, {"location": "http://elsewhere.example/v1"}, "", 0.0), END),
    ],
)  # fmt: skip
def test_verdicts(answer: module.Reply, verdicts: tuple[module.Action, ...], tmp_path: Path) -> None:
    found = [judged(answer, rows, works, tmp_path).action for rows, works in ((10, False), (10, True), (1, True))]
    assert found == list(verdicts)


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

    def test_a_healthy_server_never_sees_it(self, bench: Bench) -> None:
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

    def test_it_asks_as_often_as_it_waits(self, bench: Bench) -> None:
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

    def test_why_is_said_once_in_the_servers_words(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
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


class TestExtraBody:
    """What nobody can foresee, the user can say."""

    def test_it_goes_into_each_call_over_our_own_parameters(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich(extra_body={"seed": 7, "temperature": 0.5}, audit=2)
        assert {(call.body["seed"], call.body["temperature"]) for call in bench.server.calls} == {(7, 0.5)}
        assert len(bench.server.calls) == 4

    def test_on_the_command_line_it_is_json(self, bench: Bench) -> None:
        assert bench.write(["cake"]).command("--extra-body", '{"seed": 7}', "--quiet") == 0
        assert bench.server.calls[0].body["seed"] == 7
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["parameters"]["extra_body"] == record["prompts"][0]["extra_body"] == {"seed": 7}

    def test_it_is_part_of_what_decides_an_answer(self, bench: Bench) -> None:
        for extra_body, calls in (({"seed": 7}, 1), (None, 2), ({"seed": 8}, 3), ({"seed": 7}, 3), ({}, 3)):
            bench.write(["cake"]).enrich(extra_body=extra_body)
            assert len(bench.server.calls) == calls

    def test_the_probe_never_touches_it(self, bench: Bench) -> None:
        bench.server.gate.refuses = {"json_schema", "temperature"}
        bench.write(make_texts(20)).enrich(extra_body={"seed": 7})
        assert {call.body["seed"] for call in bench.server.calls} == {7}

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_a_bound_in_it_is_our_bound(self, bench: Bench, name: str) -> None:
        bench.write(make_texts(20)).enrich(extra_body={name: 900}, max_cost=1.0)
        bench.check()
        bounds = [{key: call.body.get(key) for key in module.BOUNDS} for call in bench.server.calls]
        assert all(bound == dict.fromkeys(module.BOUNDS) | {name: 900} for bound in bounds)
        with pytest.raises(module.BudgetExceeded):
            bench.write(make_texts(40)).enrich(extra_body={name: 90_000}, max_cost=0.02)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"model": "x"}, "cannot hold 'model', which this program sets itself"),
            ({"response_format": {}}, "cannot hold 'response_format'"),
            ("[1]", "must be a JSON object"),
            ("{", "must be a JSON object"),
            ({"x": float("nan")}, "must be a JSON object"),
            ({"x": object()}, "must be a JSON object"),
            (7, "must be a JSON object"),
        ],
    )
    def test_what_cannot_be_sent_is_refused(self, bench: Bench, given: Any, words: str) -> None:
        with pytest.raises(module.InputError, match=words):
            bench.write(["cake"]).enrich(extra_body=given)
        assert bench.server.calls == []


def test_parameters_without_a_bound_that_a_store_has_do_not_serve_a_capped_run(bench: Bench) -> None:
    bench.server.gate.refuses = {"max_completion_tokens", "max_tokens"}
    bench.write(make_texts(10)).enrich()
    bench.server.gate.refuses = set()
    bench.write(make_texts(20)).enrich(max_cost=1.0)
    assert "max_completion_tokens" in bench.server.calls[-1].body


# --- Pointless jobs


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


@pytest.mark.every_form
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


@pytest.mark.every_form
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
