"""What real servers said, replayed: each file in tests/recorded is one report, with its source. A new one needs no code.

"kind"      "chat" a reply to a chat call, "headers" those of a rate limit, "job" an object of the Batch API
"source"    the recording or thread that it is from, which has all of its words
"when"      "always", "marked" (for requests with the marked text), {"first": 2} (calls), {"more_rows_than": 4},
            or {"sent": "..."} (while that stands in the request)
"status", "headers", "body"    of the reply; $ANSWER stands for the right answer, as JSON
"options"   more arguments of the command; "also_refused": parts of a request that this server does not take either
"then"      "labelled", "blank" (the marked row alone), or "ends", with the words that the user reads in "says"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import FAST, LABELS, Bench, make_texts
from stand_in_model import Reply
from stand_in_rules import asked_labels, given_rows, in_form, labels_of

import enrich_dataset as module

RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "recorded").glob("*"))}
MARKED = "a marked text about violence"


def named(kind: str) -> list[str]:
    return [name for name, record in RECORDED.items() if record["kind"] == kind]


def right_answer(body: dict[str, Any]) -> str:
    found = {row: labels_of(text, asked_labels(body)) for row, text in given_rows(body).items()}
    return json.dumps(in_form(found, body))


def fill(part: Any, answer: str) -> Any:
    """A reply's body with the answer in the place of $ANSWER."""
    if isinstance(part, dict):
        return {name: fill(value, answer) for name, value in part.items()}
    if isinstance(part, list):
        return [fill(value, answer) for value in part]
    return part.replace("$ANSWER", answer) if isinstance(part, str) else part


def comes(when: Any, number: int, body: dict[str, Any]) -> bool:
    """Whether it is this call that is answered so."""
    if isinstance(when, str):
        return when == "always" or MARKED in given_rows(body).values()
    ((kind, value),) = when.items()
    sent = json.dumps({name: part for name, part in body.items() if name != "messages"})
    return {"first": lambda: number < value, "more_rows_than": lambda: len(given_rows(body)) > value, "sent": lambda: value in sent}[kind]()  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", named("chat"))
def test_a_recorded_reply_costs_no_more_than_its_row_or_ends_the_run_in_its_words(
    bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RECORDED[name]

    def reply(number: int, body: dict[str, Any]) -> Reply | None:
        if not comes(record["when"], number, body):
            return None
        filled = fill(record["body"], right_answer(body))
        if isinstance(filled, dict) and "id" in filled:
            filled["id"] = f"recorded-{number}"
        return record["status"], record.get("headers", {}), filled

    bench.server.on_call = reply
    bench.server.gate.refuses = set(record.get("also_refused", ()))
    bench.write([*make_texts(11), MARKED])
    code = bench.command("--api-key", "my-own-key", *record.get("options", ()))
    told = " ".join(capsys.readouterr().err.split())
    if record["then"] == "ends":
        assert code == 1
        assert record["says"].replace("`", "'") in told
        assert len(bench.server.calls) <= 3 + 16  # of three workers, and the probe's
        bench.check(blank_rows=range(12))
        return
    assert code == (3 if record["then"] == "blank" else 0)
    bench.check(blank_rows=[11] if record["then"] == "blank" else [])


@pytest.mark.parametrize("name", named("headers"))
def test_recorded_rate_limits_are_read_or_left_alone(name: str) -> None:
    record = RECORDED[name]
    limits = {kind: list(values) for kind, values in module.rate_limits(record["headers"]).items()}
    assert limits == record["limits"]


@pytest.mark.parametrize("name", named("job"))
def test_a_recorded_job_is_collected_whatever_else_its_object_says(bench: Bench, name: str) -> None:
    ours = {"id", "output_file_id", "request_counts", "metadata"}
    bench.server.batches.odd_fields = {key: value for key, value in RECORDED[name]["body"].items() if key not in ours}
    bench.server.batches.odd_fields["error_file_id"] = None
    bench.write(make_texts(12)).enrich(LABELS, **FAST)
    bench.check()
