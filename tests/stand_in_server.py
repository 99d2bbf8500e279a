"""A stand-in for OpenAI's server, on this machine: real HTTP, no model, no key, no cost.

It speaks the part of OpenAI's protocol that enrich_dataset uses, checks requests as OpenAI does, and answers by a
plain word rule (stand_in_rules.py), so that every cell that should come out is known beforehand. By hand:

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
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stand_in_jobs import BatchApi
from stand_in_model import FAULTS, HOSTILE, Faults, Gate, Limits, Model, Reply
from stand_in_rules import asked_labels, error_body, given_rows, prompt_tokens


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


class StandIn(ThreadingHTTPServer):
    """The server. What it does is set in its parts; `calls` is what it was asked.

    `on_call` is the seam for all else: it is called with the number of each chat call, from 0, and its body, before
    anything else happens, and may act, change settings, or return the reply to give. `script` has replies to give
    first; None stands for the server's own.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0, **model: Any) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.random = random.Random(0)
        self.gate = Gate()
        self.limits = Limits()
        self.faults = Faults(self.random)
        self.model = Model(self.random, **model)
        self.batches = BatchApi(self)
        self.script: deque[Reply | None] = deque()
        self.on_call: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: None
        self.spared = ""  # a text about which calls are answered at no cost, and listed in `spared_calls`
        self.calls: list[Call] = []
        self.spared_calls: list[Call] = []
        self.cached: dict[str, Any] = {}  # the completion that a cache hands out
        self.arrived = self.in_flight = self.most_in_flight = 0
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

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

    def note_call(
        self, body: dict[str, Any], at: float, status: int, fault: str = "", used: int = 0, **more: Any
    ) -> None:
        texts, labels = tuple(given_rows(body).values()), tuple(asked_labels(body))
        call = Call(at, time.monotonic(), status, fault, texts, labels, body, prompt_tokens(body), used, **more)
        (self.spared_calls if texts == (self.spared,) and not call.job else self.calls).append(call)

    def answer(self, body: dict[str, Any], key: str | None, arrived: float) -> tuple[Reply, str, int, float]:
        """The reply to a chat call, the fault in it, the completion's tokens, and the model's seconds."""
        texts = list(given_rows(body).values())
        if texts == [self.spared]:
            completion = self.model.answer(body)
            completion["usage"] = {"prompt_tokens": 0, "completion_tokens": 0}  # so that tests need not count it
            return (200, {}, completion), "", 0, 0.0
        scripted = self.script.popleft() if self.script else None
        if refusal := scripted or self.gate.refuse(body, key):
            return refusal, "", 0, 0.0
        headers, limited = self.limits.admit(body, prompt_tokens(body))
        fault = self.faults.choose(texts)
        if limited:
            return (
                (429, headers, error_body("Rate limit reached", kind=limited, code="rate_limit_exceeded")),
                fault,
                0,
                0.0,
            )
        if fault in REPLIES:
            status, content = REPLIES[fault]
            return (status, headers, content), fault, 0, 0.0
        completion = self.model.answer(body, fault)
        used = completion["usage"]["completion_tokens"]
        latency = self.model.latency(used)
        time.sleep(max(0.0, arrived + latency - time.monotonic()))
        if self.limits.charges_later:
            headers = self.limits.charge(used)
        return (200, headers, completion | self.model.odd_reply), fault, used, latency

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


@lru_cache
def bomb() -> bytes:
    """200 MB of nothing, compressed."""
    return gzip.compress(bytes(200_000_000), 1)


# Replies that take the place of a completion.
REPLIES: dict[str, tuple[int, Any]] = {
    "429": (429, error_body("Rate limit reached", kind="", code="rate_limit_exceeded")),
    "500": (500, error_body("The server had an error")),
    "503": (503, error_body("The server had an error")),
    "reset": (0, {}),
    "html": (200, "<html>Bad gateway</html>"),
    "empty": (200, {"choices": None}),
    "400-filter": (400, error_body("The response was filtered", code="content_filter")),
    "400-context": (400, error_body("maximum context length", code="context_length_exceeded")),
}


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, and writes what the server's parts reply, or breaks off."""

    server: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def send(self, reply: Reply, cut: bool = False) -> None:
        status, headers, body = reply
        kind = "text/html" if isinstance(body, str) else "application/json"
        kind = "application/octet-stream" if isinstance(body, bytes) else kind
        content = body.encode() if isinstance(body, str) else body
        content = content if isinstance(content, bytes) else json.dumps(body, ensure_ascii=False).encode()
        headers = {"date": self.date_time_string(), "content-type": kind, "content-length": str(len(content))} | headers
        self.send_response_only(status)
        for name in filter(headers.get, headers):  # one that is "" is left out
            self.send_header(name, headers[name])
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        self.close_connection |= cut

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.arrived += 1
        model = self.path.removeprefix("/v1/models/")
        models = self.server.gate.models
        if self.server.faults.drips_everywhere:
            self.be_hostile(self.server.faults.drips_everywhere, {})
        elif self.path == "/stand-in/calls":
            self.send((200, {}, self.server.summary()))
        elif re.match(r"/v1/(files|batches)\b", self.path) and self.server.batches.exists:
            self.send(self.server.batches.get(self.path))
        elif model != self.path and (models is None or model in models):
            day = "2027-01-14" if model.startswith("gpt-4o-mini") else None
            found = {"id": model, "object": "model", "created": 0, "owned_by": "x", "shutdown_date": day}
            self.send((200, {}, found))
        else:
            self.send((404, {}, error_body(f"Nothing at {self.path}")))

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        server = self.server
        with server.lock:
            server.arrived += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if server.faults.drips_everywhere:
                self.be_hostile(server.faults.drips_everywhere, {})
            elif self.path in {"/v1/files", "/v1/batches"} and server.batches.exists:
                self.send(server.batches.post(self.path, self.headers["content-type"], raw))
            elif self.path != "/v1/chat/completions":
                self.send((404, {}, "<html>Not found</html>"))
            else:
                self.chat(json.loads(raw))
        finally:
            with server.lock:
                server.in_flight -= 1

    def chat(self, body: dict[str, Any]) -> None:
        arrived = time.monotonic()
        with self.server.lock:
            number = next(self.server.numbers)
        told = self.server.on_call(number, body)
        reply, fault, used, latency = (
            (told, "", 0, 0.0) if told else self.server.answer(body, self.headers["authorization"], arrived)
        )
        self.server.note_call(body, arrived, reply[0], fault, used, latency=latency)
        if fault == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault in HOSTILE and fault != "strange-ids" and reply[0] == 200:
            self.be_hostile(fault, reply[2])
        else:
            self.send(reply, cut=fault == "cut")

    def be_hostile(self, fault: str, content: Any) -> None:
        """A reply that is not one. What drips ends when the client hangs up, or after a minute."""
        if fault == "redirect":
            return self.send((307, {"location": self.server.faults.redirect_to}, {}))
        if fault == "cache":
            self.server.cached = self.server.cached or content
            return self.send((200, {}, self.server.cached))
        self.close_connection = True
        body = json.dumps(content).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        with contextlib.suppress(OSError):
            if fault == "bomb":
                self.wfile.write(head + b"content-encoding: gzip\r\n\r\n" + bomb())
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


def share(text: str) -> tuple[str, float]:
    fault, _, value = text.partition("=")
    if fault not in FAULTS + HOSTILE:
        raise argparse.ArgumentTypeError(f"{fault} is none of {', '.join(FAULTS + HOSTILE)}")
    return fault, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for OpenAI's server, on this machine.")
    add = parser.add_argument
    add("--port", type=int, default=8000)
    add("--first-token", type=float, default=0.0, metavar="SECONDS")
    add("--per-token", type=float, default=0.0, metavar="SECONDS")
    add("--tail", type=float, default=0.0, metavar="SIGMA", help="log-normal spread of the latency")
    add("--requests-per-minute", type=float, metavar="N")
    add("--tokens-per-minute", type=float, metavar="N")
    add("--fault", type=share, action="append", default=[], metavar="NAME=SHARE", help=", ".join(FAULTS + HOSTILE))
    add("--bills", type=float, default=1.0, metavar="FACTOR", help="on the tokens that are billed")
    add("--dense", action="store_true", help="answer 0 or 1 for each label")
    add("--flips", type=float, default=0.0, metavar="SHARE", help="of cells, in calls of several texts")
    add("--job-seconds", type=float, default=5.0, metavar="SECONDS", help="how long a job takes")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = ("first_token", "per_token", "tail", "bills", "dense", "flips")
    server = StandIn(options.port, **{name: getattr(options, name) for name in settings})
    server.random.seed(options.seed)
    server.faults.shares = dict(options.fault)
    server.batches.seconds = options.job_seconds
    for name, limit in ("requests", options.requests_per_minute), ("tokens", options.tokens_per_minute):
        if limit:
            server.limits.set(name, limit)
    print(f"Stand-in server on {server.url} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
