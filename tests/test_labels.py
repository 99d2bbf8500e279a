"""Labels: a cell is 1, 0, blank or awaited, and what is known stands over what is not."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

import enrich_dataset as module

CELL = st.sampled_from([module.IN_JOB, module.BLANK, 0, 1])
TABLE = st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6)


def cells(rows: list[tuple[int, ...]]) -> module.Cells:
    return np.array(rows, np.int8)


@given(TABLE)
def test_a_cell_is_known_if_it_is_0_or_1_and_a_row_is_complete_if_all_of_its_cells_are(
    rows: list[tuple[int, ...]],
) -> None:
    known = module.is_known(cells(rows))
    assert known.tolist() == [[value in {0, 1} for value in row] for row in rows]
    assert module.complete(cells(rows)).tolist() == [set(row) <= {0, 1} for row in rows]


@given(TABLE, st.data())
def test_merge_prefers_the_known_cells_of_the_upper_table(rows: list[tuple[int, ...]], data: st.DataObject) -> None:
    above = data.draw(st.lists(st.tuples(CELL, CELL, CELL), min_size=len(rows), max_size=len(rows)))
    merged = module.merge(cells(rows), cells(above)).tolist()
    for low, high, result in zip(rows, above, merged, strict=True):
        assert result == [top if top in {0, 1} else bottom for bottom, top in zip(low, high, strict=True)]


@given(TABLE)
def test_ones_zeros_and_blanks_of_a_label_add_up_to_its_rows(rows: list[tuple[int, ...]]) -> None:
    counts = module.count_labels(cells(rows), ["a", "b", "c"])
    for place, name in enumerate("abc"):
        column = [row[place] for row in rows]
        not_known = column.count(module.BLANK) + column.count(module.IN_JOB)
        assert counts[name] == (column.count(1), column.count(0), not_known)


def test_a_column_of_a_frame_has_missing_values_where_cells_are_not_known() -> None:
    columns = module.label_columns(cells([(1, module.BLANK, 0), (0, module.IN_JOB, 1)]), ["a", "b", "c"])
    shown = {name: ["" if value is pd.NA else value for value in column] for name, column in columns.items()}
    assert shown == {"a": [1, 0], "b": ["", ""], "c": [0, 1]}
    assert {str(column.dtype) for column in columns.values()} == {"Int8"}
