"""Attempts: how long a request and its answer can be."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from conftest import LABELS, MINI, attempt_of, make_texts
from hypothesis import given
from hypothesis import strategies as st

import enrich_dataset as module


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), min_size=1, max_size=20))
def test_a_call_cannot_cost_more_than_its_bytes_as_tokens_and_its_bound(texts: list[str]) -> None:
    asked = attempt_of(texts)
    options = module.frame_options(pd.DataFrame(), "text", LABELS, model="gpt-4o-mini", max_cost=1.0, api_key="k")
    server = module.Server(options, module.Timing())
    parameters = server.default_parameters
    body = module.build_body(asked, parameters)
    sent = len(json.dumps(body, ensure_ascii=False).encode())
    bound = body["max_completion_tokens"]
    worst = module.worst_cost(asked, parameters, server, "standard")
    assert worst == pytest.approx((sent * MINI[0] + bound * MINI[1]) / 1e6)
    assert module.worst_cost(asked, parameters, server, "batch") == pytest.approx(worst / 2)
    assert module.prompt_tokens(asked, parameters) <= sent


def test_halves_of_an_attempt_hold_its_rows_in_order_and_a_lone_row_is_not_halved() -> None:
    asked = attempt_of(make_texts(5))
    parts = asked.halves(asked.rows)
    assert [row for part in parts for row in part.rows] == list(asked.rows)
    assert [len(part.rows) for part in parts] == [3, 2]
    (alone,) = asked.halves(asked.rows[:1])
    assert alone.rows == asked.rows[:1]


def test_the_output_cap_has_room_for_every_label_on_every_row() -> None:
    asked = attempt_of(make_texts(20))
    answer = json.dumps(dict.fromkeys(module.row_ids(20), LABELS), separators=(",", ":"))
    assert module.max_answer_tokens(asked) > len(answer) / 4 * 1.2
