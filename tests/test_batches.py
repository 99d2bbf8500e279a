"""Batches: rows that lack the same labels share a request, as many as fit."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
from conftest import Bench, make_texts
from hypothesis import given
from hypothesis import strategies as st

import enrich_dataset as module


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


@given(counts=st.lists(st.integers(1, 40), max_size=4), batch_size=st.integers(1, 500))
def test_batches_partition_the_pending_rows(counts: list[int], batch_size: int) -> None:
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    random.Random(sum(counts)).shuffle(groups)
    frame = pd.DataFrame({"text": [f"text {number}" for number in range(len(groups))]})
    table = module.read_table(frame, module.Columns("text", (), ()))
    lacking = np.array([[group == place for place in range(len(counts))] for group in groups], bool)
    batches = module.make_batches(table, lacking.reshape(len(groups), len(counts)), batch_size)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(len(groups)))
    assert all(len(batch.numbers) <= batch_size for batch in batches)
    assert all(batch.lacks[groups[number]] and sum(batch.lacks) == 1 for batch in batches for number in batch.numbers)
    assert len(batches) == sum(-(-count // batch_size) for count in counts)
