"""What real servers said, replayed: each file in tests/recorded is one report, with its source. A new one needs no code.

A reply to a chat call, chat-STATUS-PROVIDER-TOPIC.json:

    "kind": "chat", "what": "in a few words", "provider": "...", "source": "the recording, thread or letter that it is from"
    "when"      "always", "marked" (requests with the marked text, which is the fourth of twelve),
                {"calls": [0, 1]} (by their number, the probe's included), {"more_rows_than": 4},
                or {"sent": "..."} (while that stands in the request)
    "status", "headers" (if they matter), "body"    of the reply; $ANSWER stands for the right answer, as JSON
    "options", "also_refused"    if needed: more arguments of the command; parts of a request that are refused besides
    "then"      "labelled", "blank" (the marked row alone), or "ends", with the words that the user reads in "says"

Headers of a rate limit, headers-PROVIDER.json, have "kind": "headers", "headers" and the "limits" that they tell: capacity,
rest, and seconds until it is full again. An object of the Batch API, job-PROVIDER.json, has "kind": "job" and its "body".
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
FIELDS = {
    "chat": {"kind", "what", "provider", "source", "when", "status", "body", "then"},
    "headers": {"kind", "what", "provider", "source", "headers", "limits"},
    "job": {"kind", "what", "provider", "source", "body"},
}


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
    sent = json.dumps({name: part for name, part in body.items() if name != "messages"})
    match when:
        case "always":
            return True
        case "marked":
            return MARKED in given_rows(body).values()
        case {"calls": numbers}:
            return number in numbers
        case {"more_rows_than": count}:
            return len(given_rows(body)) > count
        case {"sent": part}:
            return part in sent
    raise ValueError(f"no such time for a reply: {when}")


@pytest.mark.parametrize("name", RECORDED)
def test_a_record_says_what_it_is_and_where_it_is_from(name: str) -> None:
    kind = RECORDED[name]["kind"]
    assert name.startswith(f"{kind}-")
    optional = {"chat": {"headers", "options", "also_refused", "says"}}.get(kind, set())
    assert FIELDS[kind] <= set(RECORDED[name]) <= FIELDS[kind] | optional
    assert len(RECORDED[name]["source"]) > 20
    assert RECORDED[name].get("then", "labelled") in {"labelled", "blank", "ends"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", named("chat"))
def test_a_recorded_reply_costs_no_more_than_its_row_or_ends_the_run_in_its_words(
    bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record, given = RECORDED[name], []

    def reply(number: int, body: dict[str, Any]) -> Reply | None:
        if not comes(record["when"], number, body):
            return None
        given.append(number)
        filled = fill(record["body"], right_answer(body))
        if isinstance(filled, dict) and "id" in filled:
            filled["id"] = f"recorded-{number}"
        return record["status"], record.get("headers", {}), filled

    bench.server.on_call = reply
    bench.server.gate.refuses = set(record.get("also_refused", ()))
    bench.write([*make_texts(3), MARKED, *make_texts(11)[3:]])
    code = bench.command("--api-key", "my-own-key", *record.get("options", ()))
    told = " ".join(capsys.readouterr().err.split())
    assert given
    if record["then"] == "ends":
        assert code == 1
        assert record["says"].replace("`", "'") in told
        assert len(bench.server.calls) <= 3 + 16  # of three workers, and the probe's
        bench.check(blank_rows=range(12))
        return
    assert code == (3 if record["then"] == "blank" else 0)
    bench.check(blank_rows=[3] if record["then"] == "blank" else [])


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
