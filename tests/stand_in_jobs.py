"""The stand-in server's files and Batch API: jobs that are worked off in so many seconds, and what may become of them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stand_in_model import Reply
from stand_in_rules import check_body, count_tokens, error_body, given_rows, refused_part, unsupported

if TYPE_CHECKING:
    from stand_in_server import StandIn


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

    @property
    def tokens(self) -> int:
        return sum(count_tokens(line["body"]["messages"][-1]["content"]) for line in self.lines)

    def view(self) -> dict[str, Any]:
        counts = {"total": len(self.lines), "completed": self.done, "failed": self.failed}
        return {
            "id": self.id, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": self.file_id,
            "completion_window": "24h", "created_at": int(self.created + self.skew), "status": self.status,
            "metadata": self.metadata, "request_counts": counts, "output_file_id": self.output,
            "error_file_id": self.errors, "errors": self.error and {"object": "list", "data": [self.error]},
        }  # fmt: skip


class BatchApi:
    """Files and jobs; its attributes are its settings."""

    def __init__(self, server: StandIn) -> None:
        self.server = server
        self.lock = threading.Lock()
        self.exists = True
        self.seconds = 0.0  # that a job takes
        self.clock_skew = 0.0  # seconds by which the server's clock is ahead
        self.plans: deque[dict[str, Any]] = deque()  # how the next jobs end: BatchJob's ends, share, error
        self.queue_tokens = float("inf")  # prompt tokens that unfinished jobs may hold together
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, BatchJob] = {}
        self.looks: deque[Reply | None] = deque()  # as the server's script, for polls and downloads
        # Oddities of what is shown.
        self.odd_fields: dict[str, Any] = {}  # that replace those of a job
        self.no_file: str | None = None  # what a job shows as the id of a file that it does not have
        self.file_states: deque[str] = deque()  # of a file, at the next jobs that are made of it; then "processed"
        self.broken_files: deque[str] = deque()  # what becomes of the next output files: "null", "empty", "html", ...
        self.long_line = 0  # bytes of a line before the others of a job's file
        # Oddities of the list of jobs.
        self.pages_lag = 0  # how many lists do not show the newest
        self.endless_pages = False  # has_more is always true
        self.oldest_first = False
        self.strange_jobs: list[Any] = []  # that it begins with
        # A point at which a request is held, so that a test can act: "upload", "create", "created", "poll", ...
        self.hold_at = ""
        self.held, self.let_go = threading.Event(), threading.Event()

    def hold(self, point: str) -> None:
        if self.hold_at == point:
            self.hold_at = ""
            self.held.set()
            self.let_go.wait(20)

    # Requests

    def post(self, path: str, content_type: str, raw: bytes) -> Reply:
        point = "create" if path == "/v1/batches" else "upload"
        self.hold(point)
        scripted = self.server.script.popleft() if self.server.script else None
        if scripted:
            return scripted
        if point == "create" and self.file_states:  # as Azure has it (openai-dotnet issue 312)
            return 400, {}, error_body(f"The file is in state {self.file_states.popleft()}")
        if point == "create":
            job = self.add_job(json.loads(raw))
            self.hold("created")
            return 200, {}, job.view()
        boundary = b"--" + content_type.partition("boundary=")[2].encode()
        (content,) = (part for part in raw.split(boundary) if b'name="file"' in part)
        name = self.add_file(content.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))
        self.hold("uploaded")
        return 200, {}, self.show_file(name)

    def get(self, path: str) -> Reply:
        scripted = self.looks.popleft() if self.looks else None
        if scripted:
            return scripted
        kind, _, rest = path.removeprefix("/v1/").partition("/")
        if kind == "files" and rest in self.files:
            return 200, {}, self.show_file(rest)
        if kind == "files":
            self.hold("download")
            content = self.break_file(self.files.get(rest.removesuffix("/content")))
            return (404, {}, error_body("No such File object")) if content is None else (200, {}, content)
        if kind == "batches":
            self.hold("poll")
            return self.show_job(rest)
        return 200, {}, self.list_jobs(path)

    def show_file(self, name: str) -> dict[str, Any]:
        """A file as the Files API describes it, with the state that it has by now."""
        return {
            "id": name, "object": "file", "bytes": len(self.files[name]), "filename": "x.jsonl", "purpose": "batch",
            "created_at": int(time.time() + self.clock_skew),
            "status": self.file_states[0] if self.file_states else "processed",
        }  # fmt: skip

    def show_job(self, name: str) -> Reply:
        if name not in self.jobs:
            return 404, {}, error_body(f"No batch found with id '{name}'.")
        self.advance(self.jobs[name])
        view = self.jobs[name].view()
        if view["output_file_id"] and self.broken_files and self.broken_files[0] == "null":
            self.broken_files.popleft()
            view["output_file_id"] = None
        view |= {name: view[name] or self.no_file for name in ("output_file_id", "error_file_id")}
        return 200, {}, view | self.odd_fields

    def list_jobs(self, path: str) -> dict[str, Any]:
        """A page of two jobs."""
        newest = [job.view() for job in reversed(self.jobs.values())]
        if self.oldest_first:
            newest.reverse()
        if self.pages_lag > 0:
            self.pages_lag -= 1
            newest = newest[1:]
        after = re.search(r"after=(\w+)", path)
        start = [job["id"] for job in newest].index(after[1]) + 1 if after else 0
        page = newest[start : start + 2] or newest[-1:] * self.endless_pages
        last = page[-1]["id"] if page else None
        more = self.endless_pages or len(newest) > start + len(page)
        return {"object": "list", "data": [*self.strange_jobs, *page], "last_id": last, "has_more": more}

    # A job's life

    def add_file(self, content: bytes) -> str:
        with self.lock:
            name = f"file-{len(self.files) + 1}"
            self.files[name] = content
        return name

    def add_job(self, asked: dict[str, Any]) -> BatchJob:
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        names = [line["custom_id"] for line in lines]
        job = BatchJob("", asked["input_file_id"], asked["metadata"], lines, skew=self.clock_skew)
        if len(set(names)) < len(names) or len({line["body"]["model"] for line in lines}) > 1 or len(lines) > 50_000:
            job.error = {"code": "invalid_file", "message": "doubled ids, several models, or too long", "line": 1}
        with self.lock:
            waiting = sum(other.tokens for other in self.jobs.values() if other.status == "in_progress")
            if waiting + job.tokens > self.queue_tokens:
                words = "Enqueued token limit reached for gpt-4o-mini in organization org-x. Limit: 1 enqueued tokens."
                job.error = {"code": "token_limit_exceeded", "message": words, "line": None, "param": None}
            plan = self.plans.popleft() if self.plans and not job.error else {}
            for name, value in plan.items():
                setattr(job, name, value)
            job.id = f"batch_{len(self.jobs) + 1}"
            job.status = "failed" if job.error else "in_progress"
            self.jobs[job.id] = job
        return job

    def advance(self, job: BatchJob) -> None:
        """Bring a job to where it is by now."""
        with self.lock:
            if job.status != "in_progress":
                return
            passed = (time.time() - job.created) / self.seconds if self.seconds else 1.0
            job.done = int(min(1.0, passed) * len(job.lines) * job.share)
            if passed < 1:
                return
            job.status = "finalizing"
        kept = int(len(job.lines) * job.share)
        good, bad = [], []
        for number, line in enumerate(job.lines):
            if number >= kept:
                error = {"code": f"batch_{job.ends}", "message": "This request could not be executed in time."}
                bad.append({"custom_id": line["custom_id"], "response": None, "error": error})
                continue
            status, body = self.answer(line["body"], job.id)
            reply = {"status_code": status, "request_id": "req_1", "body": body}
            (good if status == 200 else bad).append({"custom_id": line["custom_id"], "response": reply, "error": None})
        self.server.random.shuffle(good)
        job.output, job.errors = self.add_lines(good), self.add_lines(bad)
        job.done, job.failed, job.status = len(good), len(bad), job.ends

    def answer(self, body: dict[str, Any], job: str) -> tuple[int, Any]:
        """A job's reply to one of its requests."""
        server, part = self.server, refused_part(body, self.server.gate.refuses)
        fault = server.faults.choose(list(given_rows(body).values()))
        if complaint := check_body(body):
            status, content = 400, complaint
        elif part:
            status, content = 400, unsupported(part)
        elif fault in JOB_FAULTS:
            status, content = JOB_FAULTS[fault]
        elif fault in {"500", "503", "429", "reset", "cut", "html", "empty"}:
            status, content = 500, error_body("The server had an error")
        else:
            status, content = 200, server.model.answer(body, fault)
        used = content["usage"]["completion_tokens"] if status == 200 else 0
        server.note_call(body, time.monotonic(), status, fault, used, job=job)
        return status, content | server.model.odd_reply if status == 200 else content

    def add_lines(self, lines: list[dict[str, Any]]) -> str | None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return self.add_file(text.encode()) if lines else None

    def break_file(self, content: bytes | None) -> bytes | None:
        """What a client gets of an output file; None: a 404."""
        if content is None or b'"response"' not in content:
            return content
        if self.long_line:
            return b"x" * self.long_line + b"\n" + content
        return BREAKS[self.broken_files.popleft()](content) if self.broken_files else content

    def break_next(self, how: Callable[[bytes], bytes | None]) -> None:
        """Have the next output file be what `how` makes of it."""
        BREAKS["by the test"] = how
        self.broken_files.append("by the test")


JOB_FAULTS: dict[str, tuple[int, dict[str, Any]]] = {
    "400-filter": (400, error_body("The response was filtered", code="content_filter")),
    "404-model": (404, error_body("The model does not exist", code="model_not_found")),
    "status-0": (0, {}),
}


def doubled(content: bytes) -> bytes:
    """The lines, and the first of them again, with another answer."""
    line = json.loads(content.splitlines()[0])
    message = line["response"]["body"]["choices"][0]["message"]
    answer = json.loads(message["content"])
    message["content"] = json.dumps({row: [] if labels else ["personal_attacks"] for row, labels in answer.items()})
    return content + json.dumps(line).encode() + b"\n"


def error_first(content: bytes) -> bytes:
    line = {"custom_id": json.loads(content.splitlines()[0])["custom_id"], "response": None, "error": {"code": "x"}}
    return json.dumps(line).encode() + b"\n" + content


def half(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: len(lines) // 2])


BREAKS: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "html": lambda _: b"<html>Bad gateway</html>",
    "error": lambda _: b'{"error": {"message": "try later"}}',
    "half": half,
    "gone": lambda _: None,
    "doubled": doubled,
    "error-first": error_first,
    "nested": lambda content: b"[" * 100_000 + b"\n" + content,
}
