"""Pace: rate limits are kept before they refuse, and waited for when they do."""

from __future__ import annotations

import time

import pytest
from conftest import Bench, make_texts
from hypothesis import given
from hypothesis import strategies as st
from stand_in_rules import error_body

import enrich_dataset as module


@pytest.mark.parametrize("later", [False, True])
def test_a_limit_of_tokens_is_kept_under_both_ways_of_charging(bench: Bench, later: bool) -> None:
    bench.server.limits.set("tokens", 600_000, burst=30_000)
    bench.server.limits.charges_later, bench.server.model.first_token = later, 0.1
    bench.write(make_texts(1500)).enrich(max_workers=32)
    refused = sum(call.status == 429 for call in bench.server.calls)
    assert refused <= 0.08 * len(bench.server.calls)  # of so few calls, from which it has yet to learn
    bench.check()


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
    ("duration", "seconds"),
    [("4ms", 0.004), ("8.64s", 8.64), ("7m12s", 432), ("2s81ms", 2.081), ("5h50m30ms", 21_000.03), ("1d", 86_400), ("", 0)],
)  # fmt: skip
def test_the_durations_in_rate_limit_headers_are_read(duration: str, seconds: float) -> None:
    assert module.seconds_of(duration) == pytest.approx(seconds)


def limit_headers(limit: float, remaining: float, reset: str, name: str = "requests") -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": reset,
    }


@pytest.mark.parametrize(
    "headers",
    [
        {},
        limit_headers(0, 0, "1s"),
        limit_headers(-1, -1, ""),
        limit_headers(60, 61, "1s"),
        {"x-ratelimit-limit-requests": "many"},
    ],
)
def test_limits_that_say_nothing_are_not_believed(headers: dict[str, str]) -> None:
    assert module.rate_limits(headers) == {}


def test_capacity_level_and_refill_are_learned() -> None:
    limiter = module.Pace(8, module.Timing())
    ticket = limiter.note_start(100, now=0.0)
    limiter.note_headers(
        limit_headers(600, 0, "60s") | limit_headers(1000, 500, "30s", "project-tokens"), ticket, now=0.0
    )
    assert limiter.buckets["requests"].rate == pytest.approx(10)
    assert limiter.delay(100, now=0.0) == pytest.approx(0.2)  # two calls' worth
    assert limiter.delay(400, now=0.0) == pytest.approx((800 - 500) / (500 / 30))
    assert limiter.delay(9000, now=100.0) <= 0  # more than the bucket holds: it must do with all


def test_a_daily_limit_is_not_taken_for_one_a_minute() -> None:
    assert module.rate_limits(limit_headers(10_000, 9_999, "8.64s")) == {"requests": (10_000, 9_999, 8.64)}
    limiter = module.Pace(8, module.Timing())
    limiter.note_headers(limit_headers(10_000, 9_999, "8.64s"), limiter.note_start(1, 0.0), 0.0)
    assert limiter.buckets["requests"].rate == pytest.approx(10_000 / 86_400)


def test_what_a_server_told_holds_calls_up_for_a_minute_at_most() -> None:
    limiter = module.Pace(8, module.Timing())
    limiter.note_headers(limit_headers(60, 0, "24h"), limiter.note_start(1, 0.0), 0.0)
    assert limiter.delay(1, 10.0) == pytest.approx(50)
    assert limiter.delay(1, 60.0) <= 0
    limiter.note_start(1, 60.0)
    assert limiter.delay(1, 60.0) == pytest.approx(60)


def test_an_older_reply_teaches_nothing() -> None:
    limiter = module.Pace(8, module.Timing())
    early, late = limiter.note_start(1, 0.0), limiter.note_start(1, 1.0)
    limiter.note_headers(limit_headers(600, 500, "10s"), late, 2.0)
    limiter.note_headers(limit_headers(600, 0, "60s"), early, 2.0)
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
        limiter.note_headers(limit_headers(100, max(level, 0), f"{(100 - level) / 10}s", "tokens"), ticket, now)
