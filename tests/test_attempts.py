"""Attempts: how long a request and its answer can be."""

from __future__ import annotations

import json

from conftest import (
    LABELS,
    attempt_of,
    make_texts,
)

import enrich_dataset as module


def test_the_output_cap_has_room_for_every_label_on_every_row() -> None:
    asked = attempt_of(make_texts(20))
    answer = json.dumps(dict.fromkeys(module.row_ids(20), LABELS), separators=(",", ":"))
    assert module.max_answer_tokens(asked) > len(answer) / 4 * 1.2
