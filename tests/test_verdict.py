"""Verdict: any reply, however broken, yields right cells or none, and the right next step.

What a real server said is a file in tests/recorded (test_recorded.py); here are the rules, one by one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, Bench, make_row, make_texts, prompt_of, read_cells
from hypothesis import given
from hypothesis import strategies as st
from stand_in_rules import error_body

import enrich_dataset as module


class TestRoom:
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


@pytest.mark.every_form
class TestCaches:
    def test_a_gateway_that_answers_from_a_cache_of_other_requests_ends_the_run(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.faults.shares = {"cache": 1.0}
        assert bench.write(make_texts(100)).command("--max-workers", "1") == 1
        assert "returned a cached reply to a different request: disable the gateway's cache" in capsys.readouterr().err
        bench.check(blank_rows=range(10, 100))
        bench.server.faults.shares = {}
        bench.enrich()
        bench.check()

    @pytest.mark.parametrize("batch_size", [451, 500])
    def test_a_cache_is_noticed_whatever_the_size_of_a_batch(self, bench: Bench, batch_size: int) -> None:
        bench.server.faults.shares = {"cache": 1.0}
        texts = [f"{'violence' if number < batch_size else 'cake'} {number}" for number in range(2 * batch_size)]
        assert bench.write(texts).command("--max-workers", "1", "--batch-size", str(batch_size)) == 1
        bench.check(blank_rows=range(batch_size, 2 * batch_size))

    def test_alike_replies_of_a_server_that_numbers_them_by_the_second_are_believed_after_two(
        self, bench: Bench
    ) -> None:
        bench.server.model.odd_reply = {"id": "chatcmpl-1763", "created": 1763, "model": "m"}
        bench.write([f"tram {number}" for number in range(100)]).enrich(max_workers=1)
        bench.check()
        assert len(bench.server.calls) == 10 + module.MAX_FALSE_ALARMS

    def test_a_healthy_server_costs_no_extra_call(self, bench: Bench) -> None:
        bench.write([f"tram {number}" for number in range(100)]).enrich()
        assert len(bench.server.calls) == 10


ROWS = tuple(make_row(text) for text in ("a", "b", "c"))


A, B, C = "660", "149", "538"


FIRST, SECOND, THIRD = LABELS


def read(content: Any, form: str = "list", **choice: Any) -> tuple[dict[str, str], dict[str, str]]:
    body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"} | choice]}
    attempt, reply = module.Attempt(ROWS, prompt_of(answer_form=form)), module.Reply(200, {}, body, 0.0)
    answers, problems = module.check_answers(module.find_answers(reply, attempt), attempt)
    return {row.text: cells for row, cells in answers.items()}, {row.text: why for row, why in problems.items()}


WHOLE = {A: [], B: [FIRST], C: [SECOND, THIRD]}


RIGHT = {"a": "000", "b": "100", "c": "011"}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(WHOLE),
        json.dumps(dict(reversed(WHOLE.items()))),
        f"```json\n{json.dumps(WHOLE)}\n```",
        f"```\n{json.dumps(WHOLE, indent=2)}```\n",
        json.dumps(WHOLE | {C: [THIRD, SECOND, THIRD]}),
        json.dumps(WHOLE | {"7": [FIRST]}),
    ],
    ids=["plain", "other order", "fenced", "fenced without a name", "a label repeated", "a foreign id besides"],
)
def test_a_good_answer_is_read(content: str) -> None:
    assert read(content) == (RIGHT, {})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({A: [], C: [SECOND, THIRD]}, "its id was missing from the answer, or repeated"),
        ({A: [], "150": [FIRST], C: [SECOND, THIRD]}, "its id was missing from the answer, or repeated"),
        (WHOLE | {B: ["other"]}, "its answer had an unknown label"),
        (WHOLE | {B: [1]}, "its answer had an unknown label"),
        (WHOLE | {B: [[FIRST]]}, "its answer had an unknown label"),
        (WHOLE | {B: 1}, "its answer was not a list"),
        (WHOLE | {B: {FIRST: 1}}, "its answer was not a list"),
    ],
)
def test_only_the_row_concerned_has_a_problem(changed: dict[str, Any], reason: str) -> None:
    assert read(json.dumps(changed)) == ({"a": "000", "c": "011"}, {"b": reason})


def test_an_id_given_twice_is_not_believed() -> None:
    content = json.dumps(WHOLE)[:-1] + f', "{B}": []}}'
    assert read(content) == ({"a": "000", "c": "011"}, {"b": "its id was missing from the answer, or repeated"})


@pytest.mark.parametrize(
    ("content", "choice", "reason"),
    [
        (None, {}, "the answer was not valid JSON"),
        ("", {}, "the answer was not valid JSON"),
        ("[" * 8_000_000, {}, "the answer was not valid JSON"),
        ('["[",' * 1_000_000, {}, "the answer was not valid JSON"),
        ("<think>" * 100_000, {}, "the answer was not valid JSON"),
        ("<think></think>" * 100_000, {}, "the answer was not valid JSON"),
        ("[]", {}, "the answer was not valid JSON"),
        ("{}", {}, "its id was missing from the answer, or repeated"),
        (json.dumps({A: "a", B: "b", C: "c"}), {}, "its answer had an unknown label"),  # an echo of the request
        (json.dumps(WHOLE)[:-3], {"finish_reason": "length"}, "the answer was cut off at its maximum length"),
        ("", {"finish_reason": "content_filter"}, "stopped by the provider's content filter"),
        (None, {"message": {"content": None, "refusal": "no"}}, "the model refused to answer"),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_problem_of_all_rows(content: Any, choice: Any, reason: str) -> None:
    assert read(content, **choice) == ({}, dict.fromkeys("abc", reason))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([*LABELS, A, B, C]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([A, B, C, "1"]) | st.text(max_size=3), inner),
    max_leaves=12,
)  # fmt: skip


@given(json_values.map(json.dumps) | st.text() | json_values)
def test_any_reply_gives_each_row_an_answer_or_a_reason(content: Any) -> None:
    answers, problems = read(content)
    assert sorted([*answers, *problems]) == ["a", "b", "c"]
    assert all(len(cells) == 3 and set(cells) <= {"0", "1"} for cells in answers.values())


# Each is how a real server or model wrapped it: reports and recordings of Mistral, Groq, Ollama, vLLM, LM Studio,
# llama.cpp, DeepSeek, gpt-oss.
ENVELOPES: dict[str, Any] = {
    "thinking before it": {"content": f"<think>\nOne {{by}} one.\n</think>\n\n{json.dumps(WHOLE)}"},
    "a closing mark alone": {"content": f"First {{that}}.\n</think>{json.dumps(WHOLE)}"},
    "another draft in the thinking": {"content": f"<think>{json.dumps({A: [FIRST]})}</think>{json.dumps(WHOLE)}"},
    "brackets as marks": {"content": f"[THINK]Hm.[/THINK]{json.dumps(WHOLE)}"},
    "channels": {
        "content": f"<|channel|>analysis<|message|>{{}}<|end|><|start|>assistant<|channel|>final<|message|>{json.dumps(WHOLE)}"
    },
    "an end mark": {"content": f"{json.dumps(WHOLE)}<|im_end|>"},
    "prose around a fence": {"content": f"Here it is:\n\n```json\n{json.dumps(WHOLE)}\n```\n\nAnything {{else}}?"},
    "parts": {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": json.dumps(WHOLE)}]},
    "an object": {"content": WHOLE},
    "a tool call": {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": json.dumps(WHOLE)}}]},
    "a tool call of an object": {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": WHOLE}}]},
    "reasoning alone": {"content": "", "reasoning_content": json.dumps(WHOLE)},
    "a key around it": {"content": json.dumps({"answer": WHOLE})},
    "a list of objects": {"content": json.dumps([{"id": row, "labels": labels} for row, labels in WHOLE.items()])},
    "a wrapped list": {"content": json.dumps({"results": [{"id": int(row), "labels": x} for row, x in WHOLE.items()]})},
    "one object a row": {"content": json.dumps([{row: labels} for row, labels in WHOLE.items()])},
    "one line a row": {"content": "\n".join(json.dumps({row: labels}) for row, labels in WHOLE.items())},
    "a key around each answer": {"content": json.dumps({row: {"labels": labels} for row, labels in WHOLE.items()})},
    "encoded twice": {"content": json.dumps(json.dumps(WHOLE))},
    "near spellings": {
        "content": json.dumps({A: None, B: FIRST.upper(), C: [f" {SECOND.replace('_', '-')}", THIRD.replace("_", " ")]})
    },
    "the request echoed": {"content": json.dumps({A: "a", B: "b", C: "c"}) + json.dumps(WHOLE)},
}


@pytest.mark.parametrize("message", ENVELOPES.values(), ids=ENVELOPES)
def test_an_answer_counts_by_its_content_whatever_its_envelope(message: Any) -> None:
    assert read(None, message=message) == (RIGHT, {})


@pytest.mark.parametrize(
    ("form", "answer"),
    [("each", {FIRST.title(): "1", SECOND: False, THIRD: 0.0}), ("each", {FIRST: True, SECOND: "0", THIRD: "false"}), ("one", [FIRST]), ("one", FIRST.title())],
)  # fmt: skip
def test_values_in_near_spellings_are_read(form: str, answer: Any) -> None:
    assert read(json.dumps(dict.fromkeys((A, B, C), answer)), form) == (dict.fromkeys("abc", "100"), {})


# What looks like an answer and is none, or not for sure.
NO_ANSWERS: dict[str, Any] = {
    "thinking that was cut off": {"content": f"<think>Perhaps {json.dumps(WHOLE)}"},
    "reasoning of a reply that was cut off": {"reasoning_content": json.dumps(WHOLE), "finish_reason": "length"},
    "a draft in a reply that was cut off": {"content": f"{json.dumps(WHOLE)} But", "finish_reason": "length"},
    "two answers that differ": {
        "content": json.dumps({row: [] for row in WHOLE}) + json.dumps({row: [FIRST] for row in WHOLE})
    },
    "two tool calls": {"tool_calls": [{"function": {"arguments": json.dumps(WHOLE)}}] * 2},
    "ids of others": {"content": json.dumps({"1": [], "2": [], "3": []})},
}


@pytest.mark.parametrize("message", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_plain_answer_counts_for_no_row(message: dict[str, Any]) -> None:
    finish = message.get("finish_reason", "stop")
    assert read(None, message=message, finish_reason=finish)[0] == {}


def test_labels_that_differ_in_signs_alone_are_read_only_as_they_are() -> None:
    frame = module.frame_options(pd.DataFrame(), "text", ["a_b", "a-b"], model="m")
    prompt = module.read_prompt(frame, "a-server")
    assert [prompt.spelled(name) for name in ("a_b", "a-b", "a b", "A_B")] == ["a_b", "a-b", None, None]


def test_an_id_in_two_spellings_or_an_answer_in_two_places_that_differ_is_not_believed() -> None:
    twice = read('{"660":[]," 660":["praising_violence"],"149":[],"538":[]}')
    assert set(twice[1]) == {"a"}
    call = {"function": {"name": "f", "arguments": '{"660":["praising_violence"],"149":[],"538":[]}'}}
    message = {"content": '{"660":[],"149":[],"538":[]}', "tool_calls": [call]}
    attempt = module.Attempt(ROWS, prompt_of())
    reply = module.Reply(200, {}, {"choices": [{"message": message}]}, 0.0)
    answers, problems = module.check_answers(module.find_answers(reply, attempt), attempt)
    assert [row.text for row in problems] == ["a"]
    assert [row.text for row in answers] == ["b", "c"]


@pytest.mark.parametrize("answer", [{"error": None}, {"error": []}, {"does_not_apply": [LABELS[0]]}])
def test_a_rows_answer_is_unwrapped_only_from_what_names_an_answer(answer: Any) -> None:
    answers, problems = read(json.dumps({A: answer, B: {"labels": []}, C: []}))
    assert set(problems) == {"a"}
    assert answers["b"] == "000"


def test_a_label_that_looks_like_a_mark_of_thinking_is_read(bench: Bench) -> None:
    labels = ["[analysis] praise", "<thinking>violence"]
    for form in ("list", "each"):
        bench.write(["a prais", "a viole", "cake"]).enrich(labels, answer_form=form, overwrite=True)
        assert read_cells(bench.output, labels) == [["1", "0"], ["0", "1"], ["0", "0"]]


@pytest.mark.every_form
def test_a_lone_row_gets_two_tries(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich()
    bench.write([*make_texts(11), "poison-garbage"]).enrich(batch_size=1)
    assert bench.asked.count("poison-garbage") == 2


@pytest.mark.every_form
def test_failures_of_other_kinds_do_not_use_up_a_lone_rows_tries(bench: Bench) -> None:
    broken = [{"content": "no"}, {"content": "{}"}, {"content": "", "refusal": "no"}]
    bench.write(["tram", "cake"])
    bench.server.script.append(None)
    bench.server.script.extend((200, {}, {"choices": [{"message": message}]}) for message in broken)
    bench.enrich(batch_size=1, max_workers=1)
    assert len(bench.server.calls) == 5
    bench.check()


def reply_without_half() -> dict[str, Any]:
    """A reply to `make_texts(4)` that answers its first two rows."""
    content = json.dumps({key: ["praising_violence"] for key in module.row_ids(2)})
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}


@pytest.mark.every_form
@pytest.mark.one_form
def test_only_what_is_missing_is_asked_again(bench: Bench) -> None:
    bench.server.script.append((200, {}, reply_without_half()))
    bench.write(make_texts(4)).enrich()
    assert [len(call.texts) for call in bench.server.calls] == [4, 1, 1]
    bench.check()


@pytest.mark.every_form
@pytest.mark.one_form
def test_a_model_name_or_fingerprint_that_is_no_text_costs_no_answer(bench: Bench) -> None:
    choices = [{"message": {"content": json.dumps({A: []})}}]
    body = json.dumps({"choices": choices, "model": "m\ud800", "system_fingerprint": "\ud800"})
    bench.server.script.append((200, {}, body))
    bench.write(["cake"]).enrich(dict.fromkeys(LABELS, "a meaning \ud83d"), instructions="Be \ud83d.")
    bench.check()
    assert len(bench.server.calls) == 1


@pytest.mark.every_form
@pytest.mark.parametrize("usage", [None, "many", {"prompt_tokens": 2**70, "prompt_tokens_details": []}])
def test_a_malformed_usage_costs_no_answer(bench: Bench, usage: Any) -> None:
    content = json.dumps({key: [] for key in module.row_ids(1)})
    body = {"choices": [{"message": {"content": content}}], "usage": usage, "model": ["m"], "system_fingerprint": 1.5}
    bench.server.script.append((200, {}, body))
    bench.write(["cake"]).enrich()
    bench.check()


@pytest.mark.every_form
def test_a_poisoned_row_stays_blank_alone_and_is_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    texts = make_texts(40)
    texts[3], texts[17], texts[31] = "poison-filter", "poison-refusal", "poison-garbage"
    assert bench.write(texts).command() == 3
    bench.check(blank_rows=[3, 17, 31])
    printed = capsys.readouterr().out
    assert "rows left blank (sent again by the next run): 3\n" in printed
    assert "  row 3 (line 5): stopped by the provider's content filter\n" in printed
    assert "  row 17 (line 19): the model refused to answer\n" in printed
    assert "  row 31 (line 33): the answer was not valid JSON\n" in printed


@pytest.mark.every_form
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("400-filter", "stopped by the provider's content filter"),
        ("400-context", "too long for the model or the rate limit"),
        ("length", "the answer was cut off at its maximum length"),
        ("missing", "its id was missing from the answer, or repeated"),
        ("foreign", "its id was missing from the answer, or repeated"),
        ("doubled", "its id was missing from the answer, or repeated"),
        ("unknown", "its answer had (an unknown label|no 0 or 1 for some label)"),
    ],
)
def test_each_fault_of_content_stays_with_its_row(bench: Bench, fault: str, reason: str) -> None:
    texts = make_texts(12)
    texts[5] = f"poison-{fault}"
    frame = bench.write(texts).enrich()
    ((row, told),) = frame.attrs["enrichment"]["blank_rows"].items()
    assert row == 5
    assert re.fullmatch(reason, told)
    bench.check(blank_rows=[5])


@pytest.mark.every_form
@pytest.mark.parametrize("examples", [0, 2])
def test_a_model_that_repeats_what_it_was_shown_labels_no_row(bench: Bench, examples: int) -> None:
    """As small models do: the first JSON object of the instructions, or the answer of the examples."""
    bench.server.model.parrots = True
    shown = pd.DataFrame([[f"example {i}", *[1] * (1 if bench.form == "one" else 3), *[0] * (2 * (bench.form == "one"))] for i in range(examples)], columns=["text", *LABELS])  # fmt: skip
    bench.write(make_texts(40))
    with pytest.raises(module.ProviderError, match="its id was missing from the answer"):
        bench.enrich(examples=shown if examples else None)
    assert bench.cells == [[""] * 3] * 40


@pytest.mark.every_form
class TestCutPrompts:
    """A server that cuts a prompt to its context answers all ids under the schema; the bill alone tells."""

    LONG = tuple(f"{text} {'and so on it goes, all day long ' * 12}" for text in make_texts(40))

    @pytest.mark.parametrize("use_batch_api", [False, True])
    def test_their_answers_are_not_kept_and_their_rows_are_sent_again_fewer_at_a_time(
        self, bench: Bench, use_batch_api: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.server.model.context = 2000
        bench.write(self.LONG).enrich(batch_size=20, use_batch_api=use_batch_api, poll_interval=0.05, quiet=False)
        bench.check()
        assert "cuts prompts to about 1,000 tokens: " in capsys.readouterr().err
        assert len([call for call in bench.server.calls if call.prompt_tokens > 2000]) == 2

    def test_a_size_that_was_cut_is_not_sent_again(self, bench: Bench) -> None:
        bench.server.model.context = 2000
        bench.write([*self.LONG, *(f"{text}!" for text in self.LONG * 4)])
        bench.enrich(batch_size=20, max_workers=1)
        bench.check()
        assert len([call for call in bench.server.calls if call.prompt_tokens > 2000]) == 1

    @pytest.mark.parametrize("oddity", ["prefix", "tokenizer"])
    def test_a_server_that_counts_otherwise_loses_no_row_and_little_is_sent_twice(
        self, bench: Bench, oddity: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Ollama leaves a cached prefix out, at times."""
        bench.server.model.skips_prefix, bench.server.model.bills = (
            oddity == "prefix",
            0.4 if oddity == "tokenizer" else 1.0,
        )
        instructions = "Be strict with every text, whatever it is about. " * 400
        bench.write(make_texts(200)).enrich(instructions=instructions, max_workers=1, quiet=False)
        bench.check()
        assert len(bench.server.calls) == 20 + 2  # one was asked in halves
        assert capsys.readouterr().err.count("taken for its way of counting") == 1

    @pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}])
    def test_a_server_that_counts_nothing_is_left_alone(self, bench: Bench, usage: dict[str, Any]) -> None:
        bench.server.model.odd_reply = {"usage": None} | usage
        bench.write(self.LONG).enrich(batch_size=20)
        bench.check()
        assert len(bench.server.calls) == 2

    def test_a_lone_row_is_never_given_up_on_its_bill_alone(self, bench: Bench) -> None:
        bench.server.model.bills = 0.1
        bench.write([text * 20 for text in self.LONG[:3]]).enrich(batch_size=1)
        bench.check()
        assert len(bench.server.calls) == 3


def reply(status: int, message: str = "", code: Any = None, kind: str = "x") -> module.Reply:
    return module.Reply(status, {}, error_body(message, kind, code=code), 0.0)


def judged(answer: module.Reply, rows: int, works: bool, tmp_path: Path) -> module.Verdict:
    """The verdict on a reply to an attempt of so many rows, in a run in which something was answered, or nothing yet."""
    path = tmp_path / "in.csv"
    path.touch()
    server = module.Server(
        module.Options(path, tmp_path / "out.csv", "text", None, LABELS, api_key="k"), module.Timing()
    )
    attempt = module.Attempt(tuple(make_row(str(number)) for number in range(rows)), prompt_of())
    evidence = module.Evidence(attempt.parameters, {attempt.parameters.without_room} if works else set(), reached=True)
    return module.judge(answer, attempt, evidence, server, 0.0)


V = module.Action


ABOUT_TEXTS = (V.ADAPT, V.SPLIT, V.RETRY)  # nothing answered yet; then several rows; then a lone one


TOO_LONG = (V.SPLIT, V.SPLIT, V.GIVE_UP)


AGAIN, END = (V.RETRY,) * 3, (V.STOP,) * 3


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        (reply(401, "bad key"), END),
        (reply(402, "pay"), END),
        (reply(403, "Content violates usage guidelines."), ABOUT_TEXTS),
        (module.Reply(403, {}, "", 0.0), ABOUT_TEXTS),
        (reply(404, "no model", "model_not_found"), END),
        (reply(429, "quota", "insufficient_quota"), END),
        (reply(429, "quota", None, "insufficient_quota"), END),
        (reply(429, "spend", "project_spend_limit_exceeded"), END),
        (reply(400, "Budget has been exceeded", "400", "budget_exceeded"), END),
        (reply(429, "Your account is suspended due to insufficient balance, please recharge"), END),
        (reply(429, "Quota exceeded for metric: requests, limit: 0, model: x"), END),
        (reply(429, "Rate limit reached: requests per day"), END),
        (reply(429, "Rate limit reached: tokens per day. Please try again in 5m45.6s."), AGAIN),
        (reply(429, "You exceeded your current quota, check your billing details. Please retry in 34s"), AGAIN),
        (module.Reply(429, {"retry-after": "3700"}, {}, 0.0), END),
        (reply(429, "Rate limit reached", "rate_limit_exceeded", "tokens"), AGAIN),
        (reply(429, "None", "429"), AGAIN),
        (reply(429, "Too many tokens per minute, please wait"), AGAIN),
        (module.Reply(200, {}, {"error": {"code": 429, "message": "slow"}}, 0.0), AGAIN),
        (reply(429, "Request too large for gpt-4o", "rate_limit_exceeded", "tokens"), TOO_LONG),
        (reply(400, "This model's maximum context length is 8192 tokens."), TOO_LONG),
        (reply(400, "the request exceeds the available context size", 400, "exceed_context_size_error"), TOO_LONG),
        (reply(400, "The total length of all messages is too long."), TOO_LONG),
        (reply(413, "Payload too large"), TOO_LONG),
        (reply(400, "The response was filtered due to Azure's content management policy", "content_filter"), ABOUT_TEXTS),
        (reply(408), AGAIN),
        (reply(409), AGAIN),
        (reply(500), AGAIN),
        (reply(529), AGAIN),
        (reply(503, "overloaded", "server_is_overloaded"), AGAIN),
        (module.Reply(502, {}, "<html>Bad gateway</html>", 0.0), AGAIN),
        (module.Reply(0, {}, None, 0.0, "no answer in time"), AGAIN),
        (module.Reply(200, {}, {"choices": [{"message": {"content": ""}, "error": {"code": 502}}]}, 0.0), AGAIN),
        (module.Reply(200, {}, None, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"error": {}}, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"choices": []}, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"choices": [{"message": {}}]}, 0.0), ABOUT_TEXTS),
        (module.Reply(200, {}, {"error": "Unexpected endpoint or method."}, 0.0), ABOUT_TEXTS),
        (module.Reply(400, {}, {"error": "a text alone"}, 0.0), ABOUT_TEXTS),
        (module.Reply(422, {}, "Failed to deserialize the JSON body", 0.0), ABOUT_TEXTS),
        (module.Reply(302, {"location": "http://elsewhere.example/v1"}, "", 0.0), END),
    ],
)  # fmt: skip
def test_each_reply_gets_the_verdict_of_its_rule(
    answer: module.Reply, verdicts: tuple[module.Action, ...], tmp_path: Path
) -> None:
    found = [judged(answer, rows, works, tmp_path).action for rows, works in ((10, False), (10, True), (1, True))]
    assert found == list(verdicts)
