"""What all tests share: a clean environment, the stand-in server, tables of texts, the command in a process."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import openai
import pandas as pd
import pytest
from stand_in_rules import labels_of
from stand_in_server import Call, StandIn

import enrich_dataset as module

SCRATCH = tempfile.TemporaryDirectory()  # so that hypothesis leaves nothing beside the project
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = SCRATCH.name
# pytest -k any_bytes --hypothesis-profile=long: a fuzz, by hand.
hypothesis.settings.register_profile("long", max_examples=1_000_000, deadline=None)

ROOT = Path(__file__).parent.parent
LABELS = ["praising_violence", "personal_attacks", "sexual_harassment"]
MODEL = "gpt-4o-mini"  # named, so that the day on which the default changes changes no test
FORMS = ["list", "each", "one"]
MINI = (0.15, 0.60)  # US dollars for a million tokens of gpt-4o-mini
FAST = {"use_batch_api": True, "poll_interval": 0.05}  # a run of jobs
CODEBOOK = {label: f"what {label} means" for label in LABELS}
WORDS = ["violence", "praise", "person", "attack", "sexual", "harass", "weather", "cake", "tram", "holiday"]


def pytest_report_header() -> str:
    return f"openai {openai.__version__}, pandas {pd.__version__}, sqlite {module.sqlite3.sqlite_version}"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "TQDM_")):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def make_texts(count: int) -> list[str]:
    """Distinct texts, some of which the word rule gives labels."""
    return [f"{WORDS[i % 10]} and {WORDS[i * 7 // 10 % 10]}, number {i}" for i in range(count)]


def make_row(text: str, *context: str) -> module.Row:
    return module.Row(module.digest(text, *context), text, context)


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return path


def expected(texts: Sequence[str], labels: Sequence[str] = LABELS, form: str = "list") -> list[list[str]]:
    """The cells by the word rule; where one label is chosen, it is the first that applies, or the last of all."""
    applying = [labels_of(text, list(labels)) for text in texts]
    if form == "one":
        applying = [(found or [labels[-1]])[:1] for found in applying]
    return [[str(int(label in found)) for label in labels] for found in applying]


def read_cells(path: Path, labels: Sequence[str] = LABELS) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [[row[label] for label in labels] for row in csv.DictReader(file)]


def prompt_of(labels: Sequence[str] = LABELS, model: str = "m", **options: Any) -> module.Prompt:
    """The prompt of these options, at no server."""
    return module.read_prompt(module.frame_options(pd.DataFrame(), "text", labels, model=model, **options), "a-server")


class Bench:
    """A table of texts in a folder of its own, and the ways to have it labelled."""

    def __init__(self, folder: Path, server: StandIn, form: str = "list") -> None:
        self.server, self.form = server, form
        self.timing: module.Timing | None = None  # the program's own
        self.spares_probes = True  # in runs of jobs, whose first call asks a harmless text
        self.input = folder / "in.csv"
        self.output = folder / "out.csv"
        self.store = folder / "out.csv.answers.sqlite3"
        self.texts: list[str] = []

    def write(self, texts: Sequence[str]) -> Bench:
        self.texts = list(texts)
        write_texts(self.input, texts)
        return self

    def enrich(self, labels: Sequence[str] = LABELS, **options: Any) -> pd.DataFrame:
        options = {"base_url": self.server.url, "quiet": True, "model": MODEL, "answer_form": self.form} | options
        if options.get("use_batch_api"):
            self.server.spared = module.HARMLESS if self.spares_probes else ""
        if self.timing is None:
            return module.enrich_dataset(self.input, self.output, "text", None, labels, **options)
        quiet = bool(options.pop("quiet"))
        checked = module.Options(self.input, self.output, "text", None, labels, **options)
        return module.run(checked, module.Console(quiet), returns_frame=True, timing=self.timing)[1]

    def arguments(self, *more: str) -> list[str]:
        paths = ["--input", str(self.input), "--output", str(self.output), "--text-column", "text"]
        if "--batch-api" in more:
            self.server.spared = module.HARMLESS if self.spares_probes else ""
        return [*paths, "--model", MODEL, "--answer-form", self.form, "--labels", *LABELS, *more]

    def command(self, *more: str) -> int:
        return module.main(self.arguments("--base-url", self.server.url, *more), self.timing)

    def process(self, *more: str) -> subprocess.Popen[str]:
        program = [sys.executable, str(ROOT / "enrich_dataset.py")]
        arguments = self.arguments("--base-url", self.server.url, *more)
        return subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_until_it_calls(self, process: subprocess.Popen[str], before: int) -> None:
        """Until the server has been called again, or the process has nothing to call for."""
        while self.server.arrived == before and process.poll() is None:
            time.sleep(0.02)

    def wait_in_flight(self, count: int = 1) -> None:
        """Until the server is at so many calls, or 20 seconds have passed."""
        deadline = time.monotonic() + 20
        while self.server.in_flight < count and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def cells(self) -> list[list[str]]:
        return read_cells(self.output)

    @property
    def asked(self) -> list[str]:
        """The texts of all calls, in the order in which these were answered."""
        return [text for call in self.server.calls for text in call.texts if text != module.HARMLESS]

    def check(self, blank_rows: Sequence[int] = ()) -> None:
        """Every cell is right, and these rows alone are blank."""
        right = expected(self.texts, form=self.form)
        for number in blank_rows:
            right[number] = [""] * len(LABELS)
        assert self.cells == right


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `every_form`, by itself, its class or its file, is run under each form of the answer.

    But for those marked `one_form`: of a reply that is written out in the test, or too slow to be run three times.
    """
    has = metafunc.definition.get_closest_marker
    if "bench" in metafunc.fixturenames and has("every_form") and not has("one_form"):
        metafunc.parametrize("bench", FORMS, indirect=True)


@pytest.fixture
def bench(tmp_path: Path, server: StandIn, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, server, getattr(request, "param", "list"))


@pytest.fixture
def enrich_bytes(tmp_path: Path, server: StandIn) -> Callable[..., bytes]:
    """Bytes in, bytes out."""

    def enrich(content: bytes, text_column: str = "text", labels: Sequence[str] = ("praise",), **options: Any) -> bytes:
        path, output = tmp_path / "in.csv", tmp_path / "out.csv"
        path.write_bytes(content)
        options = {"base_url": server.url, "quiet": True} | options
        module.enrich_dataset(path, output, text_column, None, labels, **options)
        return output.read_bytes()

    return enrich


def parse(content: str, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))


@pytest.fixture
def soon(bench: Bench) -> None:
    """All that takes long takes a second, or five."""
    bench.timing = module.Timing(call=1.0, stop=1.0, find_job=5.0, longest_backoff=0.05)


@pytest.fixture
def quick(bench: Bench) -> None:
    """Waits a fiftieth as long."""
    bench.timing = module.Timing(jitter=lambda: 0.02)


def price(calls: list[Call], into: float = MINI[0], out: float = MINI[1]) -> float:
    """What calls cost, in US dollars."""
    return sum(call.prompt_tokens * into + call.completion_tokens * out for call in calls if call.status == 200) / 1e6


def billed(bench: Bench) -> float:
    """What the server has billed, in US dollars."""
    return sum(price([call], MINI[0] * bench.server.model.bills) for call in bench.server.calls)


def run_figures(frame: pd.DataFrame) -> dict[str, Any]:
    return dict(frame.attrs["enrichment"])


# The command, which then prints its peak memory in MiB: not as getrusage has it, which counts the program that started it.
PEAK = """
import pathlib, re, sys, enrich_dataset
code = enrich_dataset.main(sys.argv[1:])
print(int(re.findall(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[0]) // 1024)
sys.exit(code)
"""


# Requests without a server

MINI_PROMPT = prompt_of(model="gpt-4o-mini")


def attempt_of(texts: list[str], *context: str) -> module.Attempt:
    return module.Attempt(tuple(make_row(text, *context) for text in texts), MINI_PROMPT)


# Tables with more than texts

CONTEXT_ROWS = [
    ("1", "climate", "cake", "hate"),
    ("2", "food", "cake", "hate"),
    ("3", "food", "cake", "not"),
    ("4", "", "violence", "not"),
    ("5", "food", "cake", "hate"),
]


def write_rows(bench: Bench, rows: Any = CONTEXT_ROWS) -> Bench:
    with bench.input.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "thread", "text", "label"), *rows])
    return bench


def write_examples(bench: Bench, *texts: str, name: str = "examples.csv") -> Path:
    path = bench.input.with_name(name)
    frame = pd.DataFrame(expected(texts), columns=LABELS)
    frame.insert(0, "text", texts)
    frame.to_csv(path, index=False)
    return path


# Samples, as people code them


def keys_of(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


def sample_of(bench: Bench) -> Path:
    return Path(f"{bench.output}.sample.csv")


def read_sample(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), delimiter=delimiter))


def write_sample(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def truth(text: str) -> list[str]:
    """Another rule than the stand-in's."""
    return [str(int(word in text)) for word in ("violence", "attack", "harass")]


def code_sample(path: Path, count: int | None = None, rule: Any = truth) -> dict[str, list[str]]:
    """Fill in a sample as people do, in the order of the file."""
    rows = read_sample(path)
    for row in rows[:count]:
        row |= dict(zip(LABELS, rule(row["text"]), strict=True))
    write_sample(path, rows)
    return {row["sample_id"][:33]: [row[label] for label in LABELS] for row in rows}
