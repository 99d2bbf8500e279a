"""Replies -> answers: any reply, however broken, yields right cells or none."""

from __future__ import annotations

import json
import re
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, Bench, make_row, make_texts, prompt_of
from hypothesis import given
from hypothesis import strategies as st

import enrich_dataset as module

PROMPT = prompt_of()
ROWS = tuple(make_row(text) for text in ("a", "b", "c"))
A, B, C = "660", "149", "538"
FIRST, SECOND, THIRD = LABELS

pytestmark = pytest.mark.every_form


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
@pytest.mark.one_form
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


@pytest.mark.one_form
@pytest.mark.parametrize("message", ENVELOPES.values(), ids=ENVELOPES)
def test_an_answer_counts_by_its_content_whatever_its_envelope(message: Any) -> None:
    assert read(None, message=message) == (RIGHT, {})


@pytest.mark.one_form
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


@pytest.mark.one_form
@pytest.mark.parametrize("message", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_plain_answer_counts_for_no_row(message: dict[str, Any]) -> None:
    finish = message.get("finish_reason", "stop")
    assert read(None, message=message, finish_reason=finish)[0] == {}


@pytest.mark.one_form
def test_labels_that_differ_in_signs_alone_are_read_only_as_they_are() -> None:
    frame = module.frame_options(pd.DataFrame(), "text", ["a_b", "a-b"], model="m")
    prompt = module.read_prompt(frame, "a-server")
    assert [prompt.spelled(name) for name in ("a_b", "a-b", "a b", "A_B")] == ["a_b", "a-b", None, None]


def test_a_lone_row_gets_two_tries(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich()
    bench.write([*make_texts(11), "poison-garbage"]).enrich(batch_size=1)
    assert bench.asked.count("poison-garbage") == 2


def test_failures_of_other_kinds_do_not_use_up_a_lone_rows_tries(bench: Bench) -> None:
    broken = [{"content": "no"}, {"content": "{}"}, {"content": "", "refusal": "no"}]
    bench.write(["tram", "cake"])
    bench.server.script.append(None)
    bench.server.script.extend((200, {}, {"choices": [{"message": message}]}) for message in broken)
    bench.enrich(batch_size=1, max_workers=1)
    assert len(bench.server.calls) == 5
    bench.check()


@pytest.mark.one_form
def test_only_what_is_missing_is_asked_again(bench: Bench) -> None:
    bench.server.script.append((200, {}, reply_without_half()))
    bench.write(make_texts(4)).enrich()
    assert [len(call.texts) for call in bench.server.calls] == [4, 1, 1]
    bench.check()


def reply_without_half() -> dict[str, Any]:
    """A reply to `make_texts(4)` that answers its first two rows."""
    content = json.dumps({key: ["praising_violence"] for key in module.row_ids(2)})
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}


@pytest.mark.one_form
def test_what_a_reply_says_of_itself_may_be_no_text(bench: Bench) -> None:
    choices = [{"message": {"content": json.dumps({A: []})}}]
    body = json.dumps({"choices": choices, "model": "m\ud800", "system_fingerprint": "\ud800"})
    bench.server.script.append((200, {}, body))
    bench.write(["cake"]).enrich(dict.fromkeys(LABELS, "a meaning \ud83d"), instructions="Be \ud83d.")
    bench.check()
    assert len(bench.server.calls) == 1


@pytest.mark.parametrize("usage", [None, "many", {"prompt_tokens": 2**70, "prompt_tokens_details": []}])
def test_figures_that_a_server_misshapes_cost_no_answer(bench: Bench, usage: Any) -> None:
    content = json.dumps({key: [] for key in module.row_ids(1)})
    body = {"choices": [{"message": {"content": content}}], "usage": usage, "model": ["m"], "system_fingerprint": 1.5}
    bench.server.script.append((200, {}, body))
    bench.write(["cake"]).enrich()
    bench.check()


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


@pytest.mark.parametrize("fault", ["400-filter", "400-context", "length", "missing", "foreign", "doubled", "unknown"])
def test_each_fault_of_content_stays_with_its_row(bench: Bench, fault: str) -> None:
    texts = make_texts(12)
    texts[5] = f"poison-{fault}"
    frame = bench.write(texts).enrich()
    if fault in {"missing", "foreign", "doubled", "unknown"}:
        assert list(frame.attrs["enrichment"]["blank_rows"]) == [5]
    bench.check(blank_rows=[5])


@pytest.mark.parametrize("examples", [0, 2])
def test_a_model_that_repeats_what_it_was_shown_labels_no_row(bench: Bench, examples: int) -> None:
    """As small models do: the first JSON object of the instructions, or the answer of the examples."""
    bench.server.model.parrots = True
    shown = pd.DataFrame([[f"example {i}", *[1] * (1 if bench.form == "one" else 3), *[0] * (2 * (bench.form == "one"))] for i in range(examples)], columns=["text", *LABELS])  # fmt: skip
    bench.write(make_texts(40))
    with pytest.raises(module.ProviderError, match="its id was missing from the answer"):
        bench.enrich(examples=shown if examples else None)
    assert bench.cells == [[""] * 3] * 40


def test_no_row_ever_has_an_id_of_the_instructions_or_of_an_example(bench: Bench) -> None:
    most = [[f"example {i}", 1, 0, 0] for i in range(module.MAX_EXAMPLES)]
    frame = pd.DataFrame(most, columns=["text", *LABELS])
    bench.write(make_texts(500)).enrich(examples=frame, batch_size=500)
    system, user = (message["content"] for message in bench.server.calls[0].body["messages"])
    assert len(set(re.findall(r'"(\d{3})":', system))) == 390 + (2 if bench.form == "list" else 1)
    assert not set(re.findall(r'"(\d{3})":', system)) & set(json.loads(user))


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


def test_a_row_that_failed_is_pending_at_the_next_run(bench: Bench) -> None:
    bench.write(["cake", "poison-garbage"])
    assert bench.command("--quiet") == 3
    before = len(bench.server.calls)
    assert bench.command("--quiet") == 3
    # Nothing has been answered in this run, so that a harmless text is asked whether the server works at all.
    assert [call.texts for call in bench.server.calls[before:]] == [("poison-garbage",), (module.HARMLESS,)]


def test_many_blank_rows_are_counted_and_some_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(["cake", *(f"poison-garbage {number}" for number in range(25))])
    assert bench.command("--batch-size", "1", "--max-workers", "8") == 3
    printed = capsys.readouterr().out
    assert printed.count(": the answer was not valid JSON") == 20
    assert "  and 5 more\n" in printed
    assert "personal_attacks: 0/1 (0.0%), 25 blank" in printed
