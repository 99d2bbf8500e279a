"""Parameters: what a server refuses is left out from then on, and what the user adds goes over ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, make_texts
from hypothesis import given
from hypothesis import strategies as st

import enrich_dataset as module


def test_a_bound_that_is_too_large_for_the_model_is_kept_and_the_batch_is_split(bench: Bench) -> None:
    bench.server.gate.most_completion = 200
    bench.write(make_texts(10)).enrich()
    bench.check()
    assert [call.status for call in bench.server.calls] == [400, 200, 200]
    assert all("max_completion_tokens" in call.body for call in bench.server.calls)


def test_a_bound_that_is_too_large_for_one_row_is_dropped(bench: Bench) -> None:
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


REFUSALS = [
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
    "Unsupported parameter: 'max_completion_tokens' is not supported with this model.",
    "Unrecognized request argument supplied: reasoning_effort",
    "Unsupported value: 'minimal' is not supported. reasoning.effort Supported values are: 'low', 'medium'.",
    "'response_format.type' must be 'json_schema' or 'text'",
    "Invalid schema for response_format 'labels': In context=(), 'maxItems' is not permitted.",
    "max_tokens is too large: 100000. This model supports at most 16384 completion tokens",
    "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
]


@pytest.mark.parametrize("message", REFUSALS)
def test_each_refusal_changes_one_part_and_learning_ends(message: str) -> None:
    parameters, steps = module.default_parameters("gpt-5", is_capped=False, extra_body={}), 0
    while lower := module.fall_back(parameters, message):
        assert lower != parameters
        parameters, steps = lower, steps + 1
        assert steps < 6
    assert steps


@given(
    st.sampled_from(REFUSALS),
    st.builds(
        module.Parameters,
        format=st.sampled_from(module.Format),
        extras=st.dictionaries(st.just("temperature"), st.just(0.0)) | st.just({"reasoning_effort": "none"}),
        completion_bound=st.sampled_from([None, *module.BOUNDS]),
        has_system_role=st.booleans(),
    ),
)
def test_a_refusal_of_what_is_not_sent_changes_nothing_and_any_other_something(
    message: str, parameters: module.Parameters
) -> None:
    lower = module.fall_back(parameters, message)
    assert lower != parameters
    sent = str(parameters.shown)
    if lower is not None:
        assert str(lower.shown) != sent or parameters.has_system_role > lower.has_system_role


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
            ({"x": "\ud800"}, "must be a JSON object"),
            ({"max_tokens": None}, "must be a whole number of tokens, at least 1"),
            ({"max_completion_tokens": 16_000.0}, "must be a whole number of tokens"),
            ({"max_completion_tokens": -1}, "must be a whole number of tokens"),
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
