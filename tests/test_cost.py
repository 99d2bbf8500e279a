"""What a run costs is told before, during and after, and never passes the cap."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, Bench, expected, make_texts
from stand_in_server import Call

import enrich_dataset as module

MINI = (0.15, 0.60)  # dollars for a million tokens of gpt-4o-mini

pytestmark = pytest.mark.every_form


def price(calls: list[Call], into: float = MINI[0], out: float = MINI[1]) -> float:
    return sum(call.prompt_tokens * into + call.completion_tokens * out for call in calls if call.status == 200) / 1e6


def figures(frame: Any) -> dict[str, Any]:
    return dict(frame.attrs["enrichment"])


class TestAfter:
    def test_the_cost_is_the_list_price_of_each_call(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        told = figures(bench.write(make_texts(60)).enrich(quiet=False))
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
        told = figures(bench.write(["cake"]).enrich(model="llama3.2", quiet=False))
        assert told["cost"] is None
        assert told["tokens"]["prompt"] > 0
        assert "Cost: unknown: no price of 'llama3.2' is known (pass price)" in capsys.readouterr().out

    @pytest.mark.one_form
    def test_a_reply_is_priced_as_the_model_that_answered(self, bench: Bench) -> None:
        completion = {"choices": [{"message": {"content": '{"660": []}'}}], "model": "gpt-4.1-2025-04-14"}
        usage = {"prompt_tokens": 1000, "completion_tokens": 1000}
        bench.server.script.append((200, {}, completion | {"usage": usage}))
        assert figures(bench.write(["tram"]).enrich())["cost"] == pytest.approx((1000 * 2 + 1000 * 8) / 1e6)

    # Shapes of usage: Azure Foundry's, xAI's, Gemini's, one of -1s, and one that makes no sense at all.
    @pytest.mark.one_form
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
    def test_of_two_readings_of_a_bill_the_dearer_counts(
        self, bench: Bench, usage: Any, tokens: tuple[int, ...]
    ) -> None:
        body = {"choices": [{"message": {"content": '{"660": []}'}}], "usage": {"prompt_tokens": 78} | usage}
        bench.server.script.append((200, {}, body))
        told = figures(bench.write(["tram"]).enrich())
        prompt, cached, completion = tokens
        assert (told["tokens"]["prompt"], told["tokens"]["cached"], told["tokens"]["completion"]) == tokens
        assert told["cost"] == pytest.approx(((prompt - cached) * 0.15 + cached * 0.075 + completion * 0.60) / 1e6)

    @pytest.mark.one_form
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
        assert figures(bench.write(["tram"]).enrich(model="nobodys-model", quiet=False))["cost"] == dollars
        shown = "unknown" if dollars is None else rf"\{module.dollars(dollars)} "
        assert re.search(f"Cost: {shown}", capsys.readouterr().out)
        listed = figures(bench.enrich(fresh=True))["cost"]
        assert listed == pytest.approx((78 * 0.15 + 9 * 0.60) / 1e6)

    def test_the_users_own_price_stands(self, bench: Bench) -> None:
        told = figures(bench.write(["cake"]).enrich(model="llama3.2", price=(10, 20)))
        assert told["cost"] == pytest.approx(price(bench.server.calls, 10, 20))

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
        assert figures(bench.enrich())["reused_rows"] == 5
        assert figures(bench.enrich())["reused_rows"] == 20

    @pytest.mark.one_form
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
        tokens = figures(bench.write(["tram"]).enrich())["tokens"]
        (answered,) = [call for call in bench.server.calls if call.prompt_tokens and call.texts][-1:]
        assert tokens["prompt"] == 100 + answered.prompt_tokens
        assert tokens["completion"] == 500 + answered.completion_tokens

    @pytest.mark.one_form
    def test_a_reply_without_usage_is_counted_at_its_worst(self, bench: Bench) -> None:
        body = {"choices": [{"message": {"content": '{"660": []}'}}]}
        bench.server.script.append((200, {}, body))
        bench.write(["tram"]).enrich()
        with module.Store(bench.store) as store:
            cost, unseen = store.db.execute("SELECT cost, unconfirmed_cost FROM attempts").fetchone()
        assert cost is None
        assert unseen > price([Call(0, 0, 200, "", (), (), {}, 300, 20)])


class TestBefore:
    def test_a_dry_run_needs_no_key_sends_nothing_and_writes_nothing(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write([*make_texts(30), "tram", "tram", ""])
        arguments = bench.arguments("--dry-run")
        before = sorted(bench.input.parent.iterdir())
        assert module.main(arguments) == 0
        assert sorted(bench.input.parent.iterdir()) == before
        printed = capsys.readouterr().out
        for line in (
            "Dataset loaded: 33 rows",
            "Rows with a blank text (not sent, left blank): 1",
            "This will make 4 API calls instead of 32 (single-row processing)",
            "Distinct rows to send: 31",
            "Dry run: nothing was sent, nothing was written",
        ):
            assert f"{line}\n" in printed
        assert bench.server.calls == []

    @pytest.mark.one_form
    def test_a_dry_run_returns_what_is_known(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich(limit=5)
        calls, before = len(bench.server.calls), bench.output.read_bytes()
        frame = bench.enrich(dry_run=True)
        assert frame[LABELS].head(5).astype(int).astype(str).to_numpy().tolist() == expected(bench.texts[:5])
        assert frame[LABELS].tail(15).isna().all(axis=None)
        assert len(bench.server.calls) == calls
        assert bench.output.read_bytes() == before

    @pytest.mark.parametrize("batch_size", [5, 20])
    def test_the_estimate_is_near_what_is_then_counted(
        self, bench: Bench, batch_size: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write([text * 4 for text in make_texts(100)])
        for basis, limit, least, most in (
            ("a guess, as long as", 40, 0.3, 1.5),
            ("as in 40 answers so far", 100, 0.8, 1.2),
        ):
            options = {"batch_size": batch_size, "limit": limit}
            capsys.readouterr()
            bench.enrich(**options, dry_run=True, quiet=False)
            printed = capsys.readouterr().out
            found = re.search(r"Estimated tokens \(schema included\): ([\d,]+) in, ([\d,]+) out", printed)
            assert found
            assert basis in printed
            bench.server.calls.clear()
            bench.enrich(**options)
            real = sum(call.prompt_tokens for call in bench.server.calls)
            assert 0.9 < int(found[1].replace(",", "")) / real < 1.1
            real = sum(call.completion_tokens for call in bench.server.calls)
            assert least < int(found[2].replace(",", "")) / real < most

    def test_a_dry_run_shows_what_would_be_sent_and_the_cost_last(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(["a text about cake", "another"]).command("--dry-run") == 0
        printed = capsys.readouterr().out
        assert "=== System message ===\nJudge each text" in printed
        assert '{"660":"a text about cake"}' in printed
        assert '"strict": true' in printed
        assert "another" not in printed
        assert printed.index("Estimated cost: about $0.0000") > printed.index("strict")

    def test_what_it_shows_is_as_it_would_be_sent(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = bench.write(["a text about `limit` and cake"]).input.with_name("instructions.txt")
        path.write_text("Mind the `fresh` ones.")
        assert bench.command("--dry-run", "--instructions", str(path)) == 0
        printed = capsys.readouterr().out
        assert "Mind the `fresh` ones." in printed
        assert "a text about `limit` and cake" in printed
        assert "with --batch-api $" in printed

    def test_a_dry_run_counts_the_audit_and_says_whose_dollars_they_are(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(make_texts(20)).command("--dry-run", "--audit", "5") == 0
        printed = capsys.readouterr().out
        assert "Rows that the audit would send, each alone: 5\n" in printed
        assert re.search(
            r"Estimated cost: about \$[\d.]+, with --batch-api \$[\d.]+ \(what OpenAI would bill\)\n", printed
        )
        assert bench.command("--dry-run", "--base-url", "https://api.openai.com/v1") == 0
        assert "what OpenAI would bill" not in capsys.readouterr().out

    def test_the_estimate_of_an_unknown_model_has_no_price(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(["cake"]).command("--dry-run", "--model", "llama3.2") == 0
        assert "Estimated cost: unknown: no price of 'llama3.2' is known (pass --price)" in capsys.readouterr().out


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

    def test_the_command_ends_with_one(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
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


class TestSizes:
    @pytest.mark.parametrize(
        ("length", "rows", "sizes"),
        [(99, 99, (25, 3)), (100, 100, (12, 5)), (500, 1000, (12, 5)), (501, 1001, (7, 10)), (1, 0, (25, 3))],
    )
    def test_auto_follows_the_readmes_table(self, length: int, rows: int, sizes: tuple[int, int]) -> None:
        frame = pd.DataFrame({"text": ["x" * length] * rows}, dtype=object)
        options = module.frame_options(frame, "text", ["a"], batch_size="auto", max_workers="auto")
        table = module.read_table(frame, module.Columns("text", (), options.labels))
        fitted, _ = module.fit_to_table(options, table)
        assert (fitted.batch_size, fitted.max_workers) == sizes

    def test_auto_works_from_the_command(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(make_texts(30))
        assert bench.command("--batch-size", "auto", "--max-workers", "auto") == 0
        assert "Batch size: 25 rows per API call\nParallel workers: 3\n" in capsys.readouterr().out
        assert sorted(len(call.texts) for call in bench.server.calls) == [5, 25]

    def test_long_texts_close_a_batch_early(self, bench: Bench) -> None:
        bench.write([f"{number} " + "cake " * 5_000 for number in range(9)]).enrich()
        assert sorted(len(call.texts) for call in bench.server.calls) == [1, 2, 2, 2, 2]
        assert all(sum(map(len, call.texts)) <= module.BATCH_CHARACTERS for call in bench.server.calls)
        bench.check()


class TestRetirement:
    def test_an_unknown_model_is_told_with_what_to_pass(self, bench: Bench) -> None:
        bench.server.gate.models = {"gpt-6-luna"}
        with pytest.raises(module.ProviderError, match=r"pass another model \(at OpenAI gpt-6-luna\)"):
            bench.write(["cake"]).enrich()


class TestNeverForNothing:
    @pytest.mark.parametrize("workers", [3, 200])
    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("garbage", "the answer was not valid JSON"),
            ("refusal", "the model refused to answer"),
            ("strange-ids", "its id was missing from the answer, or repeated"),
        ],
    )
    @pytest.mark.one_form
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

    def test_it_ends_a_run_of_jobs_before_the_first_of_them(self, bench: Bench) -> None:
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


class TestBounds:
    def test_a_tokenizer_with_two_bytes_per_token_leaves_no_row_blank(self, bench: Bench) -> None:
        bench.server.model.bytes_per_token = 2
        labels = dict.fromkeys(LABELS, "what it means")
        bench.write([f"praise the violence and attack a person, sexual harassment {n}" for n in range(100)]).enrich(
            labels
        )
        bench.check()
        assert len(bench.server.calls) <= 10 + 3
        assert {len(call.texts) for call in bench.server.calls} == {10}

    def test_the_room_for_reasoning_has_an_end(self, bench: Bench) -> None:
        bench.server.model.reasoning = 10**9
        with pytest.raises(
            module.ProviderError, match=r"came to no answer in 3[23],[0-9]+ tokens, not even about a harmless text"
        ):
            bench.write(make_texts(1000)).enrich(model="gpt-5", price=(1, 1), max_cost=100.0)
        assert max(call.body["max_completion_tokens"] for call in bench.server.calls) < 35_000
        assert len(bench.server.calls) <= 60


class TestCharges:
    @pytest.mark.parametrize("later", [False, True])
    @pytest.mark.one_form
    def test_a_limit_of_tokens_is_kept_under_both_ways_of_charging(self, bench: Bench, later: bool) -> None:
        bench.server.limits.set("tokens", 600_000, burst=30_000)
        bench.server.limits.charges_later, bench.server.model.first_token = later, 0.1
        bench.write(make_texts(1500)).enrich(max_workers=32)
        refused = sum(call.status == 429 for call in bench.server.calls)
        assert refused <= 0.08 * len(bench.server.calls)  # of so few calls, from which it has yet to learn
        bench.check()
