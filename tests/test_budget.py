"""Budget: what a run may cost is never passed but by what calls in flight cost beyond their bounds."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from conftest import MINI, Bench, billed, make_texts, price
from hypothesis import given
from hypothesis import strategies as st

import enrich_dataset as module

AMOUNT = st.floats(0, 10)


@given(cap=AMOUNT, spent=AMOUNT, calls=st.lists(st.tuples(AMOUNT, st.floats(0, 1))))
def test_what_is_spent_and_set_aside_never_passes_the_cap_while_bills_keep_to_their_bounds(
    cap: float, spent: float, calls: list[tuple[float, float]]
) -> None:
    budget, in_flight = module.Budget(cap, spent, 0.0), []
    for bound, share in calls:
        if budget.reserve(bound):
            in_flight.append((bound, share * bound))
            assert budget.spent + budget.set_aside <= cap
        elif in_flight:
            budget.settle(*in_flight.pop())
        assert budget.spent + budget.set_aside <= max(cap, spent) + 1e-9
    for bound, cost in in_flight:
        budget.settle(bound, cost)
    assert budget.set_aside == pytest.approx(0, abs=1e-9)


def test_a_budget_without_a_cap_lets_every_call_leave_and_counts_it() -> None:
    budget = module.Budget(None, 0.0, 0.0)
    assert budget.reserve(1e9)
    budget.settle(1e9, 5.0)
    assert (budget.spent, budget.set_aside) == (5.0, 0.0)


class TestCap:
    def test_a_capped_run_ends_at_or_under_it_and_a_higher_cap_ends_the_job(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(400)).enrich(store_filepath=bench.store.with_name("other"))
        whole, calls = price(bench.server.calls), len(bench.server.calls)
        bench.server.calls.clear()
        with pytest.raises(module.BudgetExceeded, match=r"could exceed max_cost 0\.0"):
            bench.enrich(max_cost=whole / 3, quiet=False, overwrite=True)
        spent = price(bench.server.calls)
        assert whole / 6 < spent <= whole / 3
        told = capsys.readouterr().err
        assert "of 400 rows are labelled and saved to" in told
        assert "the rest would cost about $0.00" in told
        bench.check(blank_rows=range(len(bench.asked), 400))
        assert bench.command("--max-cost", str(whole * 2)) == 0
        assert price(bench.server.calls) == pytest.approx(whole)
        assert len(bench.server.calls) == calls
        bench.check()

    def test_the_cap_counts_all_runs_on_the_store_and_the_report_tells_what_is_left(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(200)).enrich(limit=100)
        spent = price(bench.server.calls)
        with pytest.raises(module.BudgetExceeded, match="could exceed max_cost"):
            bench.enrich(max_cost=spent * 1.8)
        assert spent < price(bench.server.calls) <= spent * 1.8
        bench.enrich(max_cost=1.0, quiet=False)
        total = price(bench.server.calls)
        told = f"all runs on this store: {module.dollars(total)}, left of max_cost: {module.dollars(1 - total)})"
        assert told in capsys.readouterr().out
        bench.check()

    def test_the_command_exits_with_1_at_the_cap(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        assert bench.write(["cake"]).command("--max-cost", "0.000001") == 1
        assert "raise it and run the same command to continue" in capsys.readouterr().err
        assert bench.server.calls == []

    def test_a_call_that_may_have_been_billed_unseen_counts_at_its_worst(self, bench: Bench) -> None:
        bench.timing = module.Timing(longest_backoff=0.05)
        bench.server.faults.shares = {"cut": 1.0}
        with pytest.raises(module.BudgetExceeded):
            bench.write(make_texts(10)).enrich(max_cost=0.002, max_retries=1000)
        assert price(bench.server.calls) <= 0.002
        with module.Store(bench.store) as store:
            assert 0.001 < store.money()[0] <= 0.002

    def test_a_refused_connection_costs_nothing(self) -> None:
        assert not module.Reply(0, {}, None, 0.0, was_sent=False).may_be_billed
        assert not module.Reply(429, {}, None, 0.0).may_be_billed
        assert all(module.Reply(status, {}, None, 0.0).may_be_billed for status in (0, 200, 408, 409, 500, 503, 524))

    def test_without_a_price_no_cost_can_be_capped(self, bench: Bench) -> None:
        with pytest.raises(module.InputError, match="pass price"):
            bench.write(["cake"]).enrich(model="llama3.2", max_cost=1.0)
        bench.enrich(model="llama3.2", max_cost=1.0, price=(1, 2))
        assert bench.server.calls[-1].body["max_completion_tokens"] > 0
        bench.check()

    def test_without_a_bound_on_answers_no_cost_can_be_capped(self, bench: Bench) -> None:
        bench.server.gate.refuses = {"max_completion_tokens", "max_tokens"}
        with pytest.raises(module.ProviderError, match="cannot limit the length of completions"):
            bench.write(["cake"]).enrich(max_cost=1.0)
        bench.enrich()
        bench.check()

    def test_room_for_reasoning_is_learnt(self, bench: Bench) -> None:
        bench.server.model.reasoning = 3_000
        bench.write(make_texts(30)).enrich(model="o9-unheard-of", max_cost=10.0, price=(1, 1))
        caps = [call.body["max_completion_tokens"] for call in bench.server.calls]
        assert caps[0] < 3_000 < caps[-1]
        bench.check()


class TestBoundsAndBills:
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

    def test_a_kill_while_a_paid_reply_waits_for_its_next_try_loses_no_bill(self, bench: Bench) -> None:
        bad = {
            "choices": [{"message": {"content": "no"}}],
            "usage": {"prompt_tokens": 1_000_000, "completion_tokens": 5},
        }
        wait = (429, {"retry-after": "60"}, {})
        bench.server.on_call = lambda number, body: None if number == 0 else (200, {}, bad) if number == 1 else wait
        process = bench.write(make_texts(3)).process("--batch-size", "1", "--max-workers", "1", "--max-cost", "1")
        while len(bench.server.calls) < 3 and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        process.kill()
        process.communicate()
        with module.Store(bench.store) as store:
            assert store.money()[0] > 0.15

    def test_no_tokenizer_that_has_a_byte_a_token_or_more_bills_beyond_what_is_set_aside(self, bench: Bench) -> None:
        """Where our guess of the tokens would let a call leave that costs more than the cap."""
        cap, bench.server.model.bills = 0.001, 3.0
        bench.write([f"tram number {number} " + "goes there and back " * 100 for number in range(30)])
        with pytest.raises(module.BudgetExceeded):
            bench.enrich(max_cost=cap)
        assert billed(bench) <= cap
        bench.enrich(max_cost=cap * 20)
        bench.check()

    def test_a_call_that_timed_out_keeps_what_was_set_aside_for_it(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.on_call = lambda number, body: time.sleep(0.0 if number else 1.0)
        assert bench.write(["cake"]).command("--max-cost", "1", "--timeout", "0.4") == 0
        assert " for 1 call of unknown cost" in capsys.readouterr().out
        with module.Store(bench.store) as store:
            assert store.money()[0] > 1.5 * price(bench.server.calls[-1:])

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
