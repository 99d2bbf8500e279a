"""The stand-in server, against what real servers sent: its shapes, its counts of tokens, its limits and its seam."""

from __future__ import annotations

import json
import time
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
from conftest import FAST, LABELS, Bench, make_texts
from stand_in_model import Bucket
from stand_in_rules import check_body, count_tokens, labels_of, unsupported
from stand_in_server import StandIn
from test_recorded import RECORDED
from test_tokens import COUNTS


def shape(value: Any) -> Any:
    """The names in an object, down to its leaves, without what other models add."""
    return {name: shape(part) for name, part in value.items()} if isinstance(value, dict) else None


def post(server: StandIn, **more: Any) -> tuple[HTTPResponse, Any]:
    """A reply and its JSON."""
    messages = [{"role": "system", "content": 'Judge.\n"praise"'}, {"role": "user", "content": '{"660":"praise"}'}]
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": messages} | more))
    reply = connection.getresponse()
    return reply, json.loads(reply.read())


def test_a_label_applies_where_the_text_has_the_first_five_letters_of_a_long_word_of_its_name() -> None:
    labels = ["praising_violence", "off_topic"]
    assert labels_of("PRAISED be the tram", labels) == ["praising_violence"]
    assert labels_of("a violent topical remark, off you go", labels) == ["praising_violence", "off_topic"]
    assert labels_of("prai viol top off", labels) == []


def test_english_and_json_have_about_as_many_tokens_as_openais_tokenizer_finds() -> None:
    plain = [(text, tokens) for text, tokens in COUNTS if text.isascii()]
    assert sum(count_tokens(text) for text, _ in plain) == pytest.approx(sum(count for _, count in plain), rel=0.05)


@pytest.mark.parametrize("name", ["job-openai", "job-azure"])
def test_a_job_has_no_field_that_recorded_jobs_lack(bench: Bench, name: str) -> None:
    bench.write(make_texts(3)).enrich(LABELS, **FAST)
    (job,) = bench.server.batches.jobs.values()
    recorded = RECORDED[name]["body"]
    assert set(job.view()) <= set(recorded)
    assert set(job.view()["request_counts"]) == set(recorded["request_counts"])
    assert job.view()["status"] == recorded["status"]


def test_a_completion_has_the_fields_of_a_recorded_one(server: StandIn) -> None:
    _, ours = post(server)
    recorded = RECORDED["chat-200-openai"]["body"]
    assert set(recorded) <= set(ours)
    assert set(recorded["choices"][0]) <= set(ours["choices"][0])
    assert set(recorded["usage"]) <= set(ours["usage"])


def test_refusals_have_the_shape_and_the_key_words_of_recorded_ones() -> None:
    recorded = RECORDED["chat-400-openai-temperature"]["body"]
    assert shape(unsupported("temperature")) == shape(recorded)
    assert unsupported("temperature")["error"]["param"] == recorded["error"]["param"]
    recorded = RECORDED["chat-400-azure-max-completion"]["body"]["error"]
    ours = check_body({"model": "m", "messages": [{}], "max_completion": 1})
    assert ours is not None
    assert ours["error"]["message"].rpartition(" ")[0] == recorded["message"].rpartition(" ")[0]


def test_a_limit_refuses_beyond_its_burst_says_so_as_openai_does_and_refills(server: StandIn) -> None:
    server.limits.set("requests", per_minute=600, burst=2)
    replies = [post(server)[0] for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    recorded = {name for name in RECORDED["headers-openai"]["headers"] if name.endswith("requests")}
    assert recorded <= set(replies[0].headers)
    time.sleep(float(replies[2].headers["retry-after-ms"]) / 1000)
    assert post(server)[0].status == 200


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    bucket = Bucket(per_minute=6_000_000, burst=5)
    time.sleep(0.01)
    bucket.take(3)
    assert bucket.level == 2


def test_a_key_and_a_model_that_it_does_not_know_are_refused(server: StandIn) -> None:
    server.gate.key, server.gate.models = "right", {"m"}
    assert post(server)[0].status == 401
    server.gate.key = None
    assert post(server, model="other")[0].status == 404
    assert post(server)[0].status == 200


def test_its_seam_sees_each_call_by_number_and_may_answer_it(server: StandIn) -> None:
    seen = []

    def second_is_a_teapot(number: int, body: dict[str, Any]) -> Any:
        seen.append((number, body["model"]))
        return (418, {"x-tea": "yes"}, {}) if number == 1 else None

    server.on_call = second_is_a_teapot
    replies = [post(server)[0] for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 418, 200]
    assert replies[1].headers["x-tea"] == "yes"
    assert seen == [(0, "m"), (1, "m"), (2, "m")]
    assert [call.status for call in server.calls] == [200, 418, 200]
