"""The parts of the stand-in server that a chat call passes: what is refused, limits, faults, and the model."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stand_in_rules import (
    asked_labels,
    check_body,
    count_tokens,
    dense_form,
    error_body,
    given_rows,
    in_form,
    labels_of,
    prompt_tokens,
    refused_part,
    spoil,
    unsupported,
)

Reply: TypeAlias = tuple[int, dict[str, str], Any]  # status, headers, body: JSON, or a page as a string

FAULTS = (
    "500", "503", "429", "reset", "cut", "html", "empty", "refusal", "filter", "length",
    "missing", "foreign", "doubled", "unknown", "garbage",
)  # fmt: skip
# What gateways, caches and proxies do at their worst: replies that drip a byte a second, never end, or unpack to 200 MB,
# a redirect, and the reply to the first request for all others.
HOSTILE = ("drip-body", "drip-header", "drip-blanks", "endless", "bomb", "redirect", "cache", "strange-ids")
# A text that holds one of these words always meets that fault, whatever it is asked with.
POISON = {f"poison-{fault}": fault for fault in (*FAULTS, "400-filter", "400-context", "404-model", "status-0")}


@dataclass
class Faults:
    """What goes wrong: by chance, in a share of the calls, and always where a text is poisoned."""

    random: random.Random
    shares: dict[str, float] = field(default_factory=dict)
    has_poison: bool = True
    redirect_to: str = "http://127.0.0.1:9/v1/chat/completions"
    drips_everywhere: str = ""  # a way to drip, for calls of all kinds

    def choose(self, texts: list[str]) -> str:
        for word, fault in POISON.items():
            if self.has_poison and any(word in text for text in texts):
                return fault
        dice = self.random.random()
        for fault, share in self.shares.items():
            dice -= share
            if dice < 0:
                return fault
        return ""


@dataclass
class Gate:
    """What is refused before any model sees it."""

    key: str | None = None  # the only key that is taken; None: any
    models: set[str] | None = None  # the only models; None: any
    refuses: set[str] = field(default_factory=set)  # parts of a request
    status: int = 400  # of such a refusal
    words: Callable[[str], dict[str, Any]] = unsupported  # of such a refusal
    banned: str = ""  # a word that is refused wherever it stands
    most_completion: int | None = None  # tokens that the model can write

    def refuse(self, body: Any, key: str | None) -> Reply | None:
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, {}, error_body("Incorrect API key provided: sk-ab***yz.", code="invalid_api_key")
        complaint = check_body(body)
        if complaint:
            return 400, {}, complaint
        if self.models is not None and body["model"] not in self.models:
            return 404, {}, error_body(f"The model `{body['model']}` does not exist", code="model_not_found")
        part = refused_part(body, self.refuses)
        if part:
            return self.status, {}, self.words(part)
        if self.banned and self.banned in json.dumps(body):
            return 400, {}, error_body("This request was rejected.")
        bound = body.get("max_completion_tokens", body.get("max_tokens", 0))
        if self.most_completion is not None and bound > self.most_completion:
            most = f"This model supports at most {self.most_completion} completion tokens."
            message = f"max_tokens is too large: {bound}. {most}"
            return 400, {}, error_body(message, param="max_completion_tokens")
        return None


@dataclass
class Bucket:
    """A token bucket, as OpenAI's limits are."""

    per_minute: float
    burst: float
    level: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at = self.burst, time.monotonic()

    def take(self, amount: float) -> None:
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.per_minute / 60) - amount
        self.at = now

    def headers(self, name: str) -> dict[str, str]:
        full = (self.burst - self.level) * 60 / self.per_minute
        return {
            f"x-ratelimit-limit-{name}": f"{self.burst:.0f}",
            f"x-ratelimit-remaining-{name}": f"{max(0.0, self.level):.0f}",
            f"x-ratelimit-reset-{name}": f"{full * 1000:.0f}ms" if full < 1 else f"{full:.2f}s",
        }


@dataclass
class Limits:
    """Rate limits of requests and tokens."""

    buckets: dict[str, Bucket] = field(default_factory=dict)  # "requests" and "tokens"
    are_told: bool = True  # in the headers of each reply
    charges_later: bool = False  # whether a prompt is charged at once and its completion later, or the bound at once
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, name: str, per_minute: float, burst: float | None = None) -> None:
        self.buckets[name] = Bucket(per_minute, per_minute if burst is None else burst)

    def admit(self, body: dict[str, Any], prompt: int) -> tuple[dict[str, str], str]:
        """Headers, and the name of the limit that refuses the call, or ""."""
        tokens = prompt if self.charges_later else max(prompt, body.get("max_completion_tokens", 0))
        with self.lock:
            costs = {name: tokens if name == "tokens" else 1 for name in self.buckets}
            refused = ""
            for name, bucket in self.buckets.items():
                bucket.take(0)
                refused = name if bucket.level < costs[name] else refused
            for name, bucket in self.buckets.items():
                bucket.take(0 if refused else costs[name])
            headers = self.headers()
            if refused and self.are_told:
                headers["retry-after-ms"] = f"{60_000 / self.buckets[refused].per_minute + 1:.0f}"
            return headers, refused

    def charge(self, tokens: int) -> dict[str, str]:
        """Take off a completion's tokens when it is known; the headers after that."""
        with self.lock:
            for name, bucket in self.buckets.items():
                bucket.take(tokens if name == "tokens" else 0)
            return self.headers()

    def headers(self) -> dict[str, str]:
        told = self.buckets.items() if self.are_told else ()
        return {name: value for kind, bucket in told for name, value in bucket.headers(kind).items()}


@dataclass
class Model:
    """What answers: by the word rule, as slowly, at such a length and as wrongly as it is set to."""

    random: random.Random
    first_token: float = 0.0  # seconds to the first token
    per_token: float = 0.0  # seconds a token after that
    tail: float = 0.0  # sigma of a log-normal factor on the latency
    reasoning: int = 0  # tokens that it thinks before it answers
    bytes_per_token: int = 0  # of a tokenizer that finds more tokens in an answer; 0: the usual ones
    bills: float = 1.0  # factor on the tokens that are billed, as by a tokenizer that finds more of them
    context: int = 0  # tokens of a prompt that it takes in; it drops what is before them, and says nothing of it
    skips_prefix: bool = False  # whether it does not count the system message, as one that it has cached
    parrots: bool = False  # whether it repeats what the instructions show as an answer
    flips: float = 0.0  # share of the cells that come out wrong where a call has several texts
    dense: bool = False  # whether it answers 0 or 1 for each label, as prompts that ask for all of them get
    odd_reply: dict[str, Any] = field(default_factory=dict)  # that replaces fields of a completion

    def answer(self, body: dict[str, Any], fault: str = "") -> dict[str, Any]:
        """The completion of a request."""
        labels, prompt = asked_labels(body), prompt_tokens(body)
        found = self.label(given_rows(body), labels, prompt)
        content = dense_form(found, labels) if self.dense else spoil(in_form(found, body), fault)
        if self.parrots:
            shown = re.findall(r'\{"\d{3}".*\}', body["messages"][0]["content"])
            content = shown[-1].replace(",...}", "}")
        message = {"role": "assistant", "content": content, "refusal": None}
        finish = {"filter": "content_filter", "length": "length"}.get(fault, "stop")
        if fault == "refusal":
            message |= {"content": None, "refusal": "I cannot help with that."}
        if fault == "length":
            message["content"] = content[: len(content) // 2]
        used = self.reasoning + self.count(content)
        bound = body.get("max_completion_tokens", body.get("max_tokens", used))
        if used > bound:
            used, finish, message["content"] = bound, "length", ""
        billed = self.context // 2 if self.context and prompt > self.context else prompt
        billed -= count_tokens(body["messages"][0]["content"]) if self.skips_prefix else 0
        return {
            "id": f"chatcmpl-{id(body):x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": f"{body['model']}-2024-07-18",
            "system_fingerprint": "fp_stand_in",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {
                "prompt_tokens": int(billed * self.bills),
                "completion_tokens": int(used * self.bills),
                "total_tokens": int((prompt + used) * self.bills),
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": min(self.reasoning, used)},
            },
        }

    def count(self, text: str) -> int:
        """A text's tokens, by another tokenizer's count if one is set."""
        tokens = count_tokens(text)
        return max(tokens, len(text.encode()) // self.bytes_per_token) if self.bytes_per_token else tokens

    def unread(self, given: dict[str, str], prompt: int) -> list[str]:
        """The rows that a context too short for a prompt leaves out: half of it is kept, as llama.cpp does."""
        if not self.context or prompt <= self.context:
            return []
        kept = itertools.accumulate(count_tokens(text) for text in reversed(given.values()))
        return list(given)[: len(given) - sum(tokens <= self.context / 2 for tokens in kept)]

    def label(self, given: dict[str, str], labels: list[str], prompt: int) -> dict[str, list[str]]:
        """The answer to a call; the cells that are flipped depend on all its texts, but not on chance."""
        answer = {row: labels_of(text, labels) for row, text in given.items()}
        answer |= {row: [] for row in self.unread(given, prompt)}
        if self.flips and len(given) > 1:
            dice = random.Random(json.dumps(given))
            for row, label in itertools.product(answer, labels):
                if dice.random() < self.flips:
                    answer[row] = [x for x in labels if (x in answer[row]) != (x == label)]
        return answer

    def latency(self, tokens: int) -> float:
        """The seconds that an answer of so many tokens takes."""
        factor = self.random.lognormvariate(0, self.tail) if self.tail else 1.0
        return (self.first_token + self.per_token * tokens) * factor
