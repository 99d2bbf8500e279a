"""A stand-in for OpenAI's server, on this machine: real HTTP, no model, no key, no cost.

It speaks the part of OpenAI's protocol that enrich_dataset uses, checks requests as OpenAI does, and
answers by a plain word rule, so that every cell that should come out is known beforehand:

    A label applies to a text if the text contains, upper or lower case alike, the first five letters of
    any word of four letters or more in the label's name. "praising_violence": "prais" or "viole".

Tokens are counted as OpenAI bills them, by the rules of enrich_dataset, the schema included. By hand:

    python tests/stand_in_server.py --port 8000 --first-token 0.4 --per-token 0.012
    python tests/stand_in_server.py --port 8000 --requests-per-minute 600 --fault reset=0.02 --fault html=0.02

It also takes files and Batch API jobs, and runs these in --job-seconds.
GET /stand-in/calls tells what it has been asked so far.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from enrich_dataset import HARMLESS, MESSAGE_TOKENS, count_tokens, schema_tokens

FAULTS = (
    "500", "503", "429", "reset", "cut", "html", "empty", "refusal", "filter", "length",
    "missing", "foreign", "doubled", "unknown", "garbage",
)  # fmt: skip
# What gateways, caches and proxies do at their worst: replies that drip a byte a second, never end, or unpack to 200 MB,
# a redirect, and the reply to the first request for all others.
HOSTILE = ("drip-body", "drip-header", "drip-blanks", "endless", "bomb", "redirect", "cache", "strange-ids")
# A text that holds one of these words always meets that fault, whatever it is asked with.
POISON = {f"poison-{fault}": fault for fault in (*FAULTS, "400-filter", "400-context", "404-model", "status-0")}


@lru_cache(maxsize=4096)
def label_stems(label: str) -> tuple[str, ...]:
    return tuple(word[:5] for word in re.findall(r"[a-z]+", label.casefold()) if len(word) >= 4)


def labels_of(text: str, labels: list[str]) -> list[str]:
    """The labels that apply to a text, by the word rule."""
    folded = text.casefold()
    return [label for label in labels if any(stem in folded for stem in label_stems(label))]


def prompt_tokens(body: dict[str, Any]) -> int:
    """What OpenAI would bill as input."""
    messages = sum(count_tokens(message["content"]) for message in body["messages"])
    return MESSAGE_TOKENS + messages + schema_tokens(body.get("response_format", {}))


def user_part(body: dict[str, Any]) -> str:
    """The rows' part of a request, which may stand behind the instructions in one message."""
    return str(body["messages"][-1]["content"]).rpartition("\n\n")[2]


def given_rows(body: dict[str, Any]) -> list[dict[str, str]]:
    """The texts of a request, with their ids: as enrich_dataset sends them, or as a list of objects."""
    message = json.loads(user_part(body))
    if isinstance(message.get("texts"), list):
        return list(message["texts"])
    return [{"id": row, "text": given if isinstance(given, str) else given[0]} for row, given in message.items()]


@dataclass(frozen=True)
class Call:
    """One chat call as it was answered; `at` and `ended` are on the monotonic clock."""

    at: float
    ended: float
    status: int
    fault: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    job: str = ""  # the Batch API job that it was part of
    latency: float = 0.0  # seconds that a model would have taken for it


@dataclass
class Limit:
    """A token bucket, as OpenAI's limits are."""

    per_minute: float
    burst: float
    level: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at = self.burst, time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def headers(self, name: str) -> dict[str, str]:
        full = (self.burst - self.level) * 60 / self.per_minute
        return {
            f"x-ratelimit-limit-{name}": f"{self.burst:.0f}",
            f"x-ratelimit-remaining-{name}": f"{max(0.0, self.level):.0f}",
            f"x-ratelimit-reset-{name}": f"{full * 1000:.0f}ms" if full < 1 else f"{full:.2f}s",
        }


@dataclass
class BatchJob:
    """A Batch API job. `ends` is the status it is to end with, `share` of its requests are done by then."""

    id: str
    file_id: str
    metadata: dict[str, str]
    lines: list[dict[str, Any]]
    ends: str = "completed"
    share: float = 1.0
    error: dict[str, Any] | None = None
    created: float = field(default_factory=time.time)
    skew: float = 0.0
    status: str = "validating"
    done: int = 0
    failed: int = 0
    output: str | None = None
    errors: str | None = None

    def view(self) -> dict[str, Any]:
        counts = {"total": len(self.lines), "completed": self.done, "failed": self.failed}
        return {
            "id": self.id, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": self.file_id,
            "completion_window": "24h", "created_at": int(self.created + self.skew), "status": self.status,
            "metadata": self.metadata, "request_counts": counts, "output_file_id": self.output,
            "error_file_id": self.errors, "errors": self.error and {"object": "list", "data": [self.error]},
        }  # fmt: skip


class StandIn(ThreadingHTTPServer):
    """The server; its attributes are its settings, and `calls` is what it was asked."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0, **settings: Any) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.first_token = 0.0  # seconds to the first token
        self.per_token = 0.0  # seconds a token after that
        self.tail = 0.0  # sigma of a log-normal factor on the latency
        self.faults: dict[str, float] = {}  # share of the calls that meet each
        self.refuses: set[str] = set()  # parts of a request that are answered with a 400, or with
        self.refusal_status = 400
        self.banned = ""  # a word that is refused wherever it stands
        self.most_completion: int | None = None  # tokens that the model can write
        self.limits: dict[str, Limit] = {}  # "requests" and "tokens"
        self.tells_limits = True
        self.key: str | None = None  # the only key that is taken; None: any
        self.models: set[str] | None = None  # the only models; None: any
        self.script: deque[tuple[int, dict[str, str], Any] | None] = deque()  # replies to give first; None: its own
        self.reasoning = 0  # tokens that the model thinks before it answers
        self.bytes_per_token = 0  # of a tokenizer that finds more tokens in an answer; 0: OpenAI's
        self.charges_later = False  # whether a limit of tokens is charged the prompt at once and the completion later
        self.bills = 1.0  # factor on the tokens that are billed, as by a tokenizer that finds more of them
        self.redirect_to = "http://127.0.0.1:9/v1/chat/completions"
        self.cached: dict[str, Any] = {}  # a completion that a cache hands to requests that are alike
        self.broken_files: deque[str] = deque()  # what becomes of the next output files: "null", "empty", "html", ...
        self.context = 0  # tokens of a prompt that it takes in; it drops what is before them, and says nothing of it
        self.skips_prefix = False  # whether it does not count the system message, as one that it has cached
        self.lets_probes_pass: bool | None = (
            None  # whether calls about the harmless text are answered, and not listed in `calls`
        )
        self.probes: list[Call] = []
        self.odd_reply: dict[str, Any] = {}  # that replaces fields of a completion
        self.parrots = False  # whether it repeats what the instructions show as an answer
        self.flips = 0.0  # share of the cells that come out wrong where a call has several texts
        self.dense = False  # answer 0 or 1 for each label, as prompts that ask for all of them get
        self.random = random.Random(0)
        self.has_batch_api = True
        self.job_seconds = 0.0
        self.clock_skew = 0.0  # seconds by which the server's clock is ahead
        self.job_plans: deque[dict[str, Any]] = deque()  # how the next jobs end: BatchJob's ends, share, error
        self.queue_tokens = float("inf")  # prompt tokens that unfinished jobs may hold together
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, BatchJob] = {}
        self.odd_fields: dict[str, Any] = {}  # that replace those of a job as it is shown
        self.no_file: str | None = None  # what a job shows as the id of a file that it does not have
        self.file_states: deque[str] = (
            deque()
        )  # of an uploaded file, at the next jobs that are made of it; then "processed"
        self.pages_lag = 0  # how many lists of jobs do not show the newest
        self.drips_everywhere = ""  # a way to drip, for calls of all kinds
        self.endless_pages = False  # has_more is always true
        self.oldest_first = False  # in a list of jobs
        self.strange_jobs: list[Any] = []  # that a list of jobs begins with
        self.looks: deque[tuple[int, dict[str, str], Any] | None] = (
            deque()
        )  # as script, for the polls and downloads of jobs
        self.long_line = 0  # bytes of a line before the others of a job's file
        self.hold_at = ""  # a point of a job's life at which a request is held: "upload", "create", ...
        self.held = threading.Event()
        self.let_go = threading.Event()
        self.calls: list[Call] = []
        self.arrived = self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        for name, value in settings.items():
            getattr(self, name)
            setattr(self, name, value)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def set_limit(self, name: str, per_minute: float, burst: float | None = None) -> None:
        self.limits[name] = Limit(per_minute, per_minute if burst is None else burst)

    def start(self) -> StandIn:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __enter__(self) -> StandIn:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that has gone."""

    def admit(self, tokens: int) -> tuple[dict[str, str], str]:
        """Headers, and the name of the limit that refuses the call, or ""."""
        with self.lock:
            refused = ""
            for name, limit in self.limits.items():
                limit.refill()
                if limit.level < (tokens if name == "tokens" else 1):
                    refused = name
            for name, limit in self.limits.items():
                limit.level -= 0 if refused else (tokens if name == "tokens" else 1)
            headers: dict[str, str] = {}
            for name, limit in self.limits.items() if self.tells_limits else ():
                headers |= limit.headers(name)
            if refused and self.tells_limits:
                headers["retry-after-ms"] = f"{60_000 / self.limits[refused].per_minute + 1:.0f}"
            return headers, refused

    def charge_later(self, tokens: int) -> dict[str, str]:
        """Take off a completion's tokens when it is known; the headers after that."""
        with self.lock:
            headers: dict[str, str] = {}
            for name, limit in self.limits.items():
                limit.refill()
                limit.level -= tokens if name == "tokens" else 0
                headers |= limit.headers(name)
            return headers

    def hold(self, point: str) -> None:
        """Let a test act while a request is under way."""
        if self.hold_at == point:
            self.hold_at = ""
            self.held.set()
            self.let_go.wait(20)

    def add_file(self, content: bytes) -> str:
        with self.lock:
            name = f"file-{len(self.files) + 1}"
            self.files[name] = content
        return name

    def add_job(self, asked: dict[str, Any]) -> BatchJob:
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        names = [line["custom_id"] for line in lines]
        error = None
        if len(set(names)) < len(names) or len({line["body"]["model"] for line in lines}) > 1 or len(lines) > 50_000:
            error = {"code": "invalid_file", "message": "doubled ids, several models, or too long", "line": 1}
        with self.lock:
            waiting = sum(job_tokens(job.lines) for job in self.jobs.values() if job.status == "in_progress")
            if waiting + job_tokens(lines) > self.queue_tokens:
                words = "Enqueued token limit reached for gpt-4o-mini in organization org-x. Limit: 1 enqueued tokens."
                error = {"code": "token_limit_exceeded", "message": words, "line": None, "param": None}
            plan = {"error": error} if error else self.job_plans.popleft() if self.job_plans else {}
            job = BatchJob(f"batch_{len(self.jobs) + 1}", asked["input_file_id"], asked["metadata"], lines, **plan)
            job.skew = self.clock_skew
            job.status = "failed" if job.error else "in_progress"
            self.jobs[job.id] = job
        return job

    def advance(self, job: BatchJob) -> None:
        """Bring a job to where it is by now."""
        with self.lock:
            if job.status != "in_progress":
                return
            passed = (time.time() - job.created) / self.job_seconds if self.job_seconds else 1.0
            job.done = int(min(1.0, passed) * len(job.lines) * job.share)
            if passed < 1:
                return
            job.status = "finalizing"
        self.work_off(job)

    def work_off(self, job: BatchJob) -> None:
        kept = int(len(job.lines) * job.share)
        good, bad = [], []
        for number, line in enumerate(job.lines):
            if number >= kept:
                error = {"code": f"batch_{job.ends}", "message": "This request could not be executed in time."}
                bad.append({"custom_id": line["custom_id"], "response": None, "error": error})
                continue
            status, body = self.work_out(line["body"], job.id)
            reply = {"status_code": status, "request_id": "req_1", "body": body}
            (good if status == 200 else bad).append({"custom_id": line["custom_id"], "response": reply, "error": None})
        self.random.shuffle(good)
        job.output, job.errors = self.add_lines(good), self.add_lines(bad)
        job.done, job.failed, job.status = len(good), len(bad), job.ends

    def break_file(self, content: bytes | None) -> bytes | None:
        """What a client gets of an output file; None: a 404."""
        if content is None:
            return None
        if b'"response"' in content and self.long_line:
            return b"x" * self.long_line + b"\n" + content
        if not self.broken_files or b'"response"' not in content:
            return content
        kind, lines = self.broken_files.popleft(), content.splitlines(keepends=True)
        line = json.loads(lines[0])
        message = line["response"]["body"]["choices"][0]["message"] if line["response"] else {}
        other = {
            row: [] if labels else ["personal_attacks"]
            for row, labels in json.loads(message.get("content", "{}")).items()
        }
        message["content"] = json.dumps(other)
        error = json.dumps({"custom_id": line["custom_id"], "response": None, "error": {"code": "x"}})
        broken: dict[str, bytes | None] = {
            "empty": b"", "html": b"<html>Bad gateway</html>", "error": b'{"error": {"message": "try later"}}',
            "half": b"".join(lines[: len(lines) // 2]), "gone": None, "doubled": content + json.dumps(line).encode() + b"\n",
            "error-first": error.encode() + b"\n" + content, "nested": b"[" * 100_000 + b"\n" + content,
        }  # fmt: skip
        return broken[kind]

    def add_lines(self, lines: list[dict[str, Any]]) -> str | None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return self.add_file(text.encode()) if lines else None

    def work_out(self, body: dict[str, Any], job: str) -> tuple[int, Any]:
        """A job's reply to one of its requests."""
        given, labels = given_rows(body), asked_labels(body)
        texts = [row["text"] for row in given]
        prompt = self.scale(prompt_tokens(body))
        fault = self.choose_fault(texts)
        status, content = 200, {}
        part = refused_part(body, self.refuses)
        if check_body(body) or part:
            status, content = 400, check_body(body) or unsupported(part)
        elif fault == "400-filter":
            status, content = 400, error_body("The response was filtered", code="content_filter")
        elif fault == "404-model":
            status, content = 404, error_body("The model does not exist", code="model_not_found")
        elif fault == "status-0":
            status, content = 0, {}
        elif fault in {"500", "503", "429", "reset", "cut", "html", "empty"}:
            status, content = 500, error_body("The server had an error")
        else:
            answer = self.label(given, labels, prompt)
            content = self.complete(body, spoil(in_form(answer, body, labels), fault), fault, prompt)
        used = content["usage"]["completion_tokens"] if status == 200 else 0
        now = time.monotonic()
        with self.lock:
            self.calls.append(Call(now, now, status, fault, tuple(texts), tuple(labels), body, prompt, used, job))
        return status, content

    def complete(self, body: dict[str, Any], content: str, fault: str, prompt: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, "refusal": None}
        finish = {"filter": "content_filter", "length": "length"}.get(fault, "stop")
        if fault == "refusal":
            message |= {"content": None, "refusal": "I cannot help with that."}
        if fault == "length":
            message["content"] = content[: len(content) // 2]
        used = self.reasoning + self.scale(count_tokens(content), len(content.encode()))
        cap = body.get("max_completion_tokens", body.get("max_tokens", used))
        if used > cap:
            used, finish, message["content"] = cap, "length", ""
        return {
            "id": f"chatcmpl-{id(body):x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": f"{body['model']}-2024-07-18",
            "system_fingerprint": "fp_stand_in",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {
                "prompt_tokens": int(self.prompt_bill(body, prompt) * self.bills),
                "completion_tokens": int(used * self.bills),
                "total_tokens": int((prompt + used) * self.bills),
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": min(self.reasoning, used)},
            },
        }

    def prompt_bill(self, body: dict[str, Any], prompt: int) -> int:
        """The tokens of a prompt that it has counted."""
        if self.context and prompt > self.context:
            return self.context // 2
        return prompt - (count_tokens(body["messages"][0]["content"]) if self.skips_prefix else 0)

    def scale(self, tokens: int, length: int = 0) -> int:
        """By another tokenizer's count, if one is set."""
        return max(tokens, length // self.bytes_per_token) if self.bytes_per_token else tokens

    def unread(self, given: list[dict[str, str]], prompt: int) -> list[dict[str, str]]:
        """The rows that a context too short for a prompt leaves out: half of it is kept, as llama.cpp does."""
        if not self.context or prompt <= self.context:
            return []
        kept = itertools.accumulate(count_tokens(row["text"]) for row in reversed(given))
        return given[: len(given) - sum(tokens <= self.context / 2 for tokens in kept)]

    def label(self, given: list[dict[str, str]], labels: list[str], prompt: int) -> dict[str, list[str]]:
        """The answer to a call; the cells that are flipped depend on all its texts, but not on chance."""
        answer = {row["id"]: labels_of(row["text"], labels) for row in given}
        answer |= {row["id"]: [] for row in self.unread(given, prompt)}
        if self.flips and len(given) > 1:
            dice = random.Random(json.dumps(given))
            for row, label in itertools.product(answer, labels):
                if dice.random() < self.flips:
                    answer[row] = [x for x in labels if (x in answer[row]) != (x == label)]
        return answer

    def choose_latency(self, tokens: int) -> float:
        seconds = self.first_token + self.per_token * tokens
        if self.tail:
            with self.lock:
                seconds *= self.random.lognormvariate(0, self.tail)
        return seconds

    def choose_fault(self, texts: list[str]) -> str:
        for word, fault in POISON.items():
            if any(word in text for text in texts):
                return fault
        with self.lock:
            dice = self.random.random()
        for fault, share in self.faults.items():
            dice -= share
            if dice < 0:
                return fault
        return ""

    def summary(self) -> dict[str, Any]:
        calls = list(self.calls)
        good = [call for call in calls if call.status == 200]
        return {
            "calls": len(calls),
            "by_status": Counter(call.status for call in calls),
            "rows": sum(len(call.texts) for call in good),
            "prompt_tokens": sum(call.prompt_tokens for call in good),
            "completion_tokens": sum(call.completion_tokens for call in good),
            "charged_tokens": sum(max(call.prompt_tokens, call.body.get("max_completion_tokens", 0)) for call in good),
            "seconds": calls[-1].at - calls[0].at if calls else 0,
            "most_in_flight": self.most_in_flight,
            "started": min((call.at for call in calls), default=0),
            "ended": max((call.ended for call in calls), default=0),
            "latencies": [call.latency for call in sorted(calls, key=lambda call: call.at)],
        }


def job_tokens(lines: list[dict[str, Any]]) -> int:
    return sum(count_tokens(line["body"]["messages"][-1]["content"]) for line in lines)


def error_body(
    message: str, kind: str = "invalid_request_error", param: Any = None, code: Any = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unsupported(param: str) -> dict[str, Any]:
    message = f"Unsupported parameter: '{param}' is not supported with this model."
    if param == "reasoning_effort":
        message = (
            "Unsupported value: 'reasoning_effort' does not support 'none' with this model. "
            "Supported values are: 'minimal', 'low', 'medium', and 'high'."
        )
    return error_body(message, param=param, code="unsupported_parameter")


def refused_part(body: dict[str, Any], refuses: set[str]) -> str:
    """The first part of a request that this server is set to refuse."""
    form = body.get("response_format", {"type": "text"})
    found = {name for name in body if name in refuses} | ({form["type"]} & refuses)
    if "maxItems" in refuses and "maxItems" in json.dumps(form):
        found.add("maxItems")
    if body.get("reasoning_effort") not in {"none", None}:
        found.discard("reasoning_effort")
    if "temperature" in body and body.get("reasoning_effort") not in {"none", None}:
        found.add("temperature")
    return min(found, default="")


def check_schema(schema: Any, path: str = "") -> str:
    """What OpenAI would say against a strict schema, or ""."""
    root = schema
    enums: list[Any] = []
    properties = 0

    def walk(node: Any, place: str) -> str:
        nonlocal properties
        if "$ref" in node:
            return "" if node["$ref"].removeprefix("#/$defs/") in root.get("$defs", {}) else f"{place}: bad $ref"
        unknown = set(node) - {
            "type",
            "properties",
            "required",
            "additionalProperties",
            "$defs",
            "items",
            "enum",
            "maxItems",
        }
        if unknown:
            return f"In context={place}, '{unknown.pop()}' is not permitted."
        enums.extend(node.get("enum", ()))
        if node.get("type") == "object":
            names = node.get("properties", {})
            properties += len(names)
            if node.get("additionalProperties") is not False:
                return f"In context={place}, 'additionalProperties' is required to be supplied and to be false."
            if sorted(node.get("required", [])) != sorted(names):
                return f"In context={place}, 'required' is required to be an array including every key in properties."
        children = [*node.get("properties", {}).items(), *node.get("$defs", {}).items()]
        children += [("items", node["items"])] if "items" in node else []
        return next(filter(None, (walk(child, f"{place}/{name}") for name, child in children)), "")

    if schema.get("type") != "object":
        return "schema must be a JSON Schema of 'type: \"object\"'"
    return walk(schema, path) or (
        "too many enum values" if len(enums) > 1000 else "too many properties" if properties > 5000 else ""
    )


def check_body(body: Any) -> dict[str, Any] | None:
    """The 400 that OpenAI would give to a request, or None."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not body.get("messages"):
        return error_body("you must provide a model and messages")
    known = {
        "model", "messages", "response_format", "temperature", "reasoning_effort", "max_completion_tokens", "max_tokens",
        "stream", "seed",
    }  # fmt: skip
    if set(body) - known:
        return error_body(f"Unrecognized request argument supplied: {min(set(body) - known)}")
    form = body.get("response_format", {"type": "text"})
    if form["type"] == "json_object" and "json" not in json.dumps(body["messages"]).lower():
        return error_body("'messages' must contain the word 'json' in some form, to use 'response_format'.")
    if form["type"] == "json_schema":
        given = form["json_schema"]
        complaint = "" if re.fullmatch(r"[\w-]{1,64}", given.get("name", "")) else "bad name"
        complaint = complaint or check_schema(given["schema"])
        if complaint:
            name = given.get("name")
            return error_body(f"Invalid schema for response_format '{name}': {complaint}", param="response_format")
    return None


def answer_schema(body: dict[str, Any]) -> dict[str, Any]:
    """The schema of one row's answer, or {}."""
    form = body.get("response_format", {})
    schema = form["json_schema"]["schema"] if form.get("type") == "json_schema" else {}
    return (
        dict(schema["$defs"]["a"] if "$defs" in schema else next(iter(schema["properties"].values()))) if schema else {}
    )


def asked_form(body: dict[str, Any]) -> str:
    """The answer's form: "list", "each" or "one", from the schema, or without one from the system message."""
    kind = answer_schema(body).get("type")
    if kind:
        return {"array": "list", "object": "each", "string": "one"}[kind]
    message = body["messages"][0]["content"]
    return "one" if "which one label" in message else "each" if "and 1 if it applies" in message else "list"


def in_form(answer: dict[str, list[str]], body: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """Where one label is asked for, it is the first that applies, or the last of all."""
    form = asked_form(body)
    if form == "each":
        return {row: {label: int(label in applying) for label in labels} for row, applying in answer.items()}
    if form == "one":
        return {row: next(iter(applying), labels[-1]) for row, applying in answer.items()}
    return dict(answer)


def asked_labels(body: dict[str, Any]) -> list[str]:
    """The labels of a request, from its schema, or without one from the system message."""
    schema = answer_schema(body)
    if schema:
        return list(schema.get("enum") or schema.get("properties") or schema["items"]["enum"])
    return [
        json.loads(name)
        for name in re.findall(r'^(?:- )?(".*?[^\\]")(?::|$)', body["messages"][0]["content"], re.MULTILINE)
    ]


def spoil(answer: dict[str, Any], fault: str) -> str:
    """The answer's JSON, with a fault of content in it."""
    ids = list(answer)
    victim = ids[len(ids) // 2]
    if fault == "garbage":
        return "I think that none of these are a problem."
    if fault == "doubled":
        return json.dumps(answer)[:-1] + f', "{victim}": []}}'
    if fault == "missing":
        del answer[victim]
    if fault == "strange-ids":
        answer = {str(number): given for number, given in enumerate(answer.values(), 1)}
    if fault == "foreign":
        answer = {("7" if row == victim else row): labels for row, labels in answer.items()}
    if fault == "unknown":
        answer[victim] = ["no_such_label"] if isinstance(answer[victim], list) else "no_such_label"
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def spread(answer: dict[str, list[str]], labels: list[str]) -> str:
    """The answer's JSON in the long form, with a 0 or 1 for each label."""
    dense = {row: {label: int(label in applying) for label in labels} for row, applying in answer.items()}
    return json.dumps(dense, separators=(",", ":"), ensure_ascii=False)


class Handler(BaseHTTPRequestHandler):
    """One connection. The request's path decides, then the script, the limits, the faults, the word rule."""

    server: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        self.close_connection |= cut

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.arrived += 1
        if self.server.drips_everywhere:
            return self.be_hostile(self.server.drips_everywhere, {})
        if self.path == "/stand-in/calls":
            return self.send(200, self.server.summary())
        if re.match(r"/v1/(files|batches)\b", self.path) and self.server.has_batch_api:
            return self.show_job_or_file()
        model = self.path.removeprefix("/v1/models/")
        if model != self.path and (self.server.models is None or model in self.server.models):
            day = "2027-01-14" if model.startswith("gpt-4o-mini") else None
            return self.send(200, {"id": model, "object": "model", "created": 0, "owned_by": "x", "shutdown_date": day})
        return self.send(404, error_body(f"Nothing at {self.path}"))

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            self.server.arrived += 1
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            self.take(raw)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def take(self, raw: bytes) -> None:
        if self.server.drips_everywhere:
            return self.be_hostile(self.server.drips_everywhere, {})
        if self.path in {"/v1/files", "/v1/batches"} and self.server.has_batch_api:
            return self.take_job_or_file(raw)
        if self.path != "/v1/chat/completions":
            return self.send(404, "<html>Not found</html>")
        return self.answer(json.loads(raw))

    def take_job_or_file(self, raw: bytes) -> None:
        server, point = self.server, "create" if self.path == "/v1/batches" else "upload"
        server.hold(point)
        scripted = server.script.popleft() if server.script else None
        if scripted:
            return self.send(scripted[0], scripted[2], scripted[1])
        if point == "create" and server.file_states:  # as Azure has it (openai-dotnet issue 312)
            return self.send(400, error_body(f"The file is in state {server.file_states.popleft()}"))
        if point == "create":
            job = server.add_job(json.loads(raw))
            server.hold("created")
            return self.send(200, job.view())
        boundary = b"--" + self.headers["content-type"].partition("boundary=")[2].encode()
        (content,) = (part for part in raw.split(boundary) if b'name="file"' in part)
        name = server.add_file(content.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))
        server.hold("uploaded")
        return self.show_file(name)

    def show_file(self, name: str) -> None:
        """A file as the Files API describes it, with the state that it has by now."""
        states = self.server.file_states
        self.send(200, {
            "id": name, "object": "file", "bytes": len(self.server.files[name]), "filename": "x.jsonl", "purpose": "batch",
            "created_at": int(time.time() + self.server.clock_skew), "status": states[0] if states else "processed",
        })  # fmt: skip

    def show_job_or_file(self) -> None:
        server, (name, _, rest) = self.server, self.path.removeprefix("/v1/").partition("/")
        scripted = server.looks.popleft() if server.looks else None
        if scripted:
            return self.send(scripted[0], scripted[2], scripted[1])
        if name == "files":
            if rest in server.files:
                return self.show_file(rest)
            server.hold("download")
            content = server.break_file(server.files.get(rest.removesuffix("/content")))
            return self.send(404, error_body("No such File object")) if content is None else self.send_raw(content)
        if name == "batches":
            server.hold("poll")
            if rest not in server.jobs:
                return self.send(404, error_body(f"No batch found with id '{rest}'."))
            server.advance(server.jobs[rest])
            view = server.jobs[rest].view()
            if view["output_file_id"] and server.broken_files and server.broken_files[0] == "null":
                server.broken_files.popleft()
                view["output_file_id"] = None
            view |= {name: view[name] or server.no_file for name in ("output_file_id", "error_file_id")}
            return self.send(200, view | server.odd_fields)
        newest = [job.view() for job in reversed(server.jobs.values())]
        if server.oldest_first:
            newest.reverse()
        if server.pages_lag > 0:
            server.pages_lag -= 1
            newest = newest[1:]
        after = re.search(r"after=(\w+)", self.path)
        start = [job["id"] for job in newest].index(after[1]) + 1 if after else 0
        page = newest[start : start + 2] or newest[-1:] * server.endless_pages
        last = page[-1]["id"] if page else None
        more = server.endless_pages or len(newest) > start + len(page)
        return self.send(
            200, {"object": "list", "data": [*server.strange_jobs, *page], "last_id": last, "has_more": more}
        )

    def send_raw(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/octet-stream")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def be_hostile(self, fault: str, content: Any) -> None:
        """A reply that is not one. What drips ends when the client hangs up, or after a minute."""
        if fault == "redirect":
            return self.send(307, {}, {"location": self.server.redirect_to})
        if fault == "cache":
            self.server.cached = self.server.cached or content
            return self.send(200, self.server.cached)
        self.close_connection = True
        body = json.dumps(content).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        with contextlib.suppress(OSError):
            if fault == "bomb":
                self.wfile.write(head + b"content-encoding: gzip\r\n\r\n" + gzip.compress(bytes(200_000_000), 1))
                return self.wfile.flush()
            self.wfile.write(head + (b"" if fault == "drip-header" else b"\r\n"))
            pieces: Iterable[bytes] = (
                itertools.repeat(b" " * 65_536) if fault == "endless" else itertools.repeat(b" ", 60)
            )
            if fault in {"drip-body", "drip-header"}:
                pieces = (bytes([byte]) for byte in (body if fault == "drip-body" else b"x-slow: " + bytes(60)))
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.0 if fault == "endless" else 1.0)
        return None

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, body: dict[str, Any]) -> None:
        arrived = time.monotonic()
        given = given_rows(body)
        texts = [row["text"] for row in given]
        labels = asked_labels(body)
        prompt = self.server.scale(prompt_tokens(body))
        fault, latency = "", 0.0
        is_spared = self.server.lets_probes_pass and texts == [HARMLESS]
        if is_spared:
            content = json.dumps(in_form(self.server.label(given, labels, prompt), body, labels))
            completion = self.server.complete(body, content, "", prompt)
            completion["usage"] = {"prompt_tokens": 0, "completion_tokens": 0}  # so that tests need not count it
            return self.send_spared(Call(
                arrived, arrived, 200, "", tuple(texts), tuple(labels), body, prompt, completion["usage"]["completion_tokens"]
            ), completion)  # fmt: skip

        def reply(status: int, content: Any, headers: dict[str, str] | None = None, completion: int = 0) -> None:
            ended = time.monotonic()
            call = Call(
                arrived, ended, status, fault, tuple(texts), tuple(labels), body, prompt, completion, latency=latency
            )
            with self.server.lock:
                self.server.calls.append(call)
            if fault == "reset":
                return self.hang_up()
            if fault in HOSTILE and fault != "strange-ids" and status == 200:
                return self.be_hostile(fault, content)
            return self.send(status, content, headers, cut=fault == "cut")

        refusal = self.refuse(body)
        if refusal:
            return reply(*refusal)
        charged = prompt if self.server.charges_later else max(prompt, body.get("max_completion_tokens", 0))
        headers, limited = self.server.admit(charged)
        fault = self.server.choose_fault(texts)
        if limited or fault == "429":
            return reply(429, error_body("Rate limit reached", kind=limited, code="rate_limit_exceeded"), headers)
        if fault in {"500", "503"}:
            return reply(int(fault), error_body("The server had an error"), headers)
        if fault == "reset":
            return reply(0, {})
        if fault in {"html", "empty"}:
            return reply(200, "<html>Bad gateway</html>" if fault == "html" else {"choices": None}, headers)
        if fault == "400-filter":
            return reply(400, error_body("The response was filtered", code="content_filter"), headers)
        if fault == "400-context":
            return reply(400, error_body("maximum context length", code="context_length_exceeded"), headers)
        answer = self.server.label(given, labels, prompt)
        content = spread(answer, labels) if self.server.dense else spoil(in_form(answer, body, labels), fault)
        if self.server.parrots:
            shown = re.findall(r'\{"\d{3}".*\}', body["messages"][0]["content"])
            content = shown[-1].replace(",...}", "}")
        completion = self.server.complete(body, content, fault, prompt)
        used = completion["usage"]["completion_tokens"]
        latency = self.server.choose_latency(used)
        time.sleep(max(0.0, arrived + latency - time.monotonic()))
        if self.server.charges_later:
            headers = self.server.charge_later(used)
        return reply(200, completion | self.server.odd_reply, headers, used)

    def send_spared(self, call: Call, completion: dict[str, Any]) -> None:
        with self.server.lock:
            self.server.probes.append(call)
        return self.send(200, completion)

    def refuse(self, body: Any) -> tuple[int, Any, dict[str, str]] | tuple[int, Any] | None:
        server = self.server
        with server.lock:
            scripted = server.script.popleft() if server.script else None
            if scripted:
                return scripted[0], scripted[2], scripted[1]
        if server.key is not None and self.headers["authorization"] != f"Bearer {server.key}":
            return 401, error_body("Incorrect API key provided: sk-ab***yz.", code="invalid_api_key")
        complaint = check_body(body)
        if complaint:
            return 400, complaint
        if server.models is not None and body["model"] not in server.models:
            return 404, error_body(f"The model `{body['model']}` does not exist", code="model_not_found")
        part = refused_part(body, server.refuses)
        if part:
            return server.refusal_status, unsupported(part)
        if server.banned and server.banned in json.dumps(body):
            return 400, error_body("This request was rejected.")
        bound = body.get("max_completion_tokens", body.get("max_tokens", 0))
        if server.most_completion is not None and bound > server.most_completion:
            most = f"This model supports at most {server.most_completion} completion tokens."
            return 400, error_body(f"max_tokens is too large: {bound}. {most}", param="max_completion_tokens")
        return None


def share(text: str) -> tuple[str, float]:
    fault, _, value = text.partition("=")
    if fault not in FAULTS + HOSTILE:
        raise argparse.ArgumentTypeError(f"{fault} is none of {', '.join(FAULTS + HOSTILE)}")
    return fault, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for OpenAI's server, on this machine.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--first-token", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--per-token", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--tail", type=float, default=0.0, metavar="SIGMA", help="log-normal spread of the latency")
    parser.add_argument("--requests-per-minute", type=float, metavar="N")
    parser.add_argument("--tokens-per-minute", type=float, metavar="N")
    parser.add_argument(
        "--fault", type=share, action="append", default=[], metavar="NAME=SHARE", help=", ".join(FAULTS + HOSTILE)
    )
    parser.add_argument("--bills", type=float, default=1.0, metavar="FACTOR", help="on the tokens that are billed")
    parser.add_argument(
        "--broken-file",
        action="append",
        default=[],
        metavar="KIND",
        help="what becomes of the next output file of a job: null, empty, html, error, half, gone, doubled",
    )
    parser.add_argument("--dense", action="store_true", help="answer 0 or 1 for each label")
    parser.add_argument("--flips", type=float, default=0.0, metavar="SHARE", help="of cells, in calls of several texts")
    parser.add_argument("--job-seconds", type=float, default=5.0, metavar="SECONDS", help="how long a job takes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    server = StandIn(options.port, first_token=options.first_token, per_token=options.per_token, tail=options.tail)
    server.faults = dict(options.fault)
    server.random = random.Random(options.seed)
    server.job_seconds = options.job_seconds
    server.flips = options.flips
    server.bills = options.bills
    server.broken_files.extend(options.broken_file)
    server.dense = options.dense
    for name, limit in ("requests", options.requests_per_minute), ("tokens", options.tokens_per_minute):
        if limit:
            server.set_limit(name, limit)
    print(f"Stand-in server on {server.url} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
