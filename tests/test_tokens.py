"""Tokens: counts that were taken by OpenAI's own tokenizer (token_counts.json) are met without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import enrich_dataset as module

COUNTS = [(each["text"], each["tokens"]) for each in json.loads(Path(__file__).with_name("token_counts.json").read_text("utf-8"))["counts"]]  # fmt: skip
PLAIN = [
    (text, tokens)
    for text, tokens in COUNTS
    if text.isascii() and tokens > 15 and not text.startswith(("RT", "SELECT"))
]


def test_plain_english_and_json_are_counted_within_a_tenth_together_and_a_quarter_each() -> None:
    assert len(PLAIN) > 10
    counted = [module.count_tokens(text) for text, _ in PLAIN]
    assert sum(counted) == pytest.approx(sum(tokens for _, tokens in PLAIN), rel=0.1)
    assert all(0.75 <= ours / tokens <= 1.25 for ours, (_, tokens) in zip(counted, PLAIN, strict=True))


@pytest.mark.parametrize(("text", "tokens"), COUNTS, ids=range(len(COUNTS)))
def test_no_text_of_any_script_is_counted_as_fewer_than_three_fifths_of_its_tokens_or_twice_as_many(
    text: str, tokens: int
) -> None:
    assert module.MIN_BILLED <= module.count_tokens(text) / tokens <= 1.6


def test_a_schema_is_billed_without_what_openai_leaves_out() -> None:
    """By hand: the JSON that is left, {"type":"object","properties":{"660":{"type":"string"}}}, and 9 tokens around it."""
    part = {"type": "string", "additionalProperties": False}
    schema = {"type": "object", "properties": {"660": part}, "required": ["660"], "additionalProperties": False}
    left = '{"type":"object","properties":{"660":{"type":"string"}}}'
    form = {"type": "json_schema", "json_schema": {"name": "labels", "strict": True, "schema": schema}}
    assert module.schema_tokens(form) == 9 + module.count_tokens(left)
    assert module.schema_tokens({"type": "json_object"}) == 0
