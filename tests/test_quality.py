"""Quality: the audit, and figures of agreement."""

from __future__ import annotations

import math
import re

import pytest
from conftest import LABELS, Bench, make_texts, run_figures

import enrich_dataset as module


class TestAudit:
    def test_it_finds_the_share_that_packing_changes(self, bench: Bench) -> None:
        bench.server.model.flips = 0.1
        told = run_figures(bench.write(make_texts(600)).enrich(audit=400))["audit"]
        for values in told.values():
            low, high = values["agreement_95"]
            assert values["rows"] == 400
            assert low < 0.9 < high
            assert 0 < values["kappa"] < 1
            assert len(values["rows_that_differ"]) == round(400 * (1 - values["agreement"]))

    def test_with_an_exact_annotator_kappa_is_1_and_labels_stay(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = run_figures(bench.write(make_texts(60)).enrich(audit=30, quiet=False))["audit"]
        for values in told.values():
            assert (values["agreement"], values["kappa"], values["rows_that_differ"]) == (1.0, 1.0, [])
        bench.check()
        printed = capsys.readouterr().out
        assert "Auditing 30 rows, each alone in its call: 30 API calls...\n" in printed
        assert "=== Audit: re-queried, each row alone, each label forced ===\n" in printed
        assert [len(call.texts) for call in bench.server.calls] == [10] * 6 + [1] * 30

    def test_its_answers_never_become_labels(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich()
        with module.Store(bench.store) as store:
            store.db.execute("UPDATE attempts SET answers = replace(answers, '0', '1')")
            store.db.commit()
        told = run_figures(bench.enrich(audit=20))["audit"]
        assert bench.cells == [["1"] * 3] * 20
        assert all(values["agreement"] < 1 for values in told.values())

    def test_its_bar_shows_its_own_rows_per_second(self, bench: Bench) -> None:
        bench.server.model.first_token = 0.1
        process = bench.write(make_texts(300)).process("--batch-size", "100", "--audit", "6", "--max-workers", "1")
        _, errors = process.communicate(timeout=60)
        (rate,) = re.findall(r"6/6 \[.*?, (\d+) rows/s", errors)
        assert 3 <= int(rate) <= 12

    def test_cells_that_the_input_gives_are_not_audited(self, bench: Bench) -> None:
        bench.input.write_text(f"text,{LABELS[0]}\nviolence,0\ntram,\n")
        told = run_figures(bench.enrich(audit=10))["audit"]
        assert {values["rows"] for values in told.values()} == {1}

    def test_an_audit_is_paid_once_a_larger_one_holds_it_and_another_seed_draws_other_rows(self, bench: Bench) -> None:
        bench.write(make_texts(40)).enrich(audit=10)
        calls = len(bench.server.calls)
        bench.enrich(audit=10)
        assert len(bench.server.calls) == calls
        bench.enrich(audit=15)
        assert len(bench.server.calls) == calls + 5
        bench.enrich(audit=10, seed=1)
        assert len(bench.server.calls) > calls + 5

    def test_it_goes_by_jobs_too(self, bench: Bench) -> None:
        frame = bench.write(make_texts(20)).enrich(audit=10, use_batch_api=True, poll_interval=0.05)
        assert {values["rows"] for values in run_figures(frame)["audit"].values()} == {10}
        assert {call.job for call in bench.server.calls} == {"batch_1", "batch_2"}

    def test_the_cap_counts_it(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich()
        with pytest.raises(module.BudgetExceeded):
            bench.enrich(audit=20, max_cost=0.0005)
        bench.check()

    def test_a_dry_run_tells_its_calls_too(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(make_texts(20)).enrich(dry_run=True, quiet=False)
        plain = capsys.readouterr().out
        bench.enrich(dry_run=True, audit=20, quiet=False)
        audited = capsys.readouterr().out
        tokens = [
            int(text.partition("tokens (schema included): ")[2].partition(" in")[0].replace(",", ""))
            for text in (plain, audited)
        ]
        assert tokens[1] > 5 * tokens[0]
        bench.enrich()
        capsys.readouterr()
        bench.enrich(dry_run=True, audit=20, quiet=False)
        assert "(schema included): 0 in" not in capsys.readouterr().out


def test_wilsons_interval_of_a_known_case() -> None:
    low, high = module.wilson(15, 148)  # Newcombe (1998), table I
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert module.wilson(0, 20)[0] == pytest.approx(0)
    assert all(math.isnan(bound) for bound in module.wilson(0, 0))
