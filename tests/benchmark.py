"""What the plan costs in time, calls, tokens, processor and memory: measured side by side in one run.

    python tests/benchmark.py          # everything, about 20 minutes on 2 cores
    python tests/benchmark.py sample   # one part: sample, plans, tail, sizes, limits

Each plan runs in a process of its own against a stand-in server in another: the plans that a person would
write, and this program. "Of the ideal": the calls' own latencies packed on so many workers with nothing
between them, over the wall time from the first call's arrival to the last one's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import heapq
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import enrich_dataset as module  # noqa: E402
from example_usage import LABELS  # noqa: E402

SAMPLE = HERE.parent / "HatefulData.csv"
BATCH = 10


# --- The plans, each as a person would write it -----------------------------------------------------------


def dense_body(texts: Sequence[str]) -> dict[str, Any]:
    """Every label of every text is to be answered with 0 or 1."""
    names = "\n".join(f"- {json.dumps(label)}" for label in LABELS)
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts, 1)]
    return {
        "model": "gpt-4o-mini",
        "temperature": 0,
        "response_format": {"type": "json_object"},
        "messages": [
            {"role": "system", "content": f"Answer in json, for each id and label 0 or 1.\n{names}"},
            {"role": "user", "content": json.dumps({"texts": rows})},
        ],
    }


def sparse_bodies(path: Path) -> list[dict[str, Any]]:
    """This program's own requests, for a client that does nothing but send them."""
    options = module.Options(path, None, "text", None, LABELS)
    prompt = module.read_prompt(options, "a-server")
    rows = [module.Row(module.digest(text), text) for text in dict.fromkeys(read_texts(path))]
    parameters = module.default_parameters("gpt-4o-mini", is_capped=False, extra_body={})
    batches = (tuple(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))
    return [module.build_body(module.Attempt(batch, prompt), parameters) for batch in batches]


def read_texts(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def in_batches(path: Path, size: int) -> list[dict[str, Any]]:
    texts = read_texts(path)
    return [dense_body(texts[start : start + size]) for start in range(0, len(texts), size)]


def send_in_threads(bodies: list[dict[str, Any]], url: str, workers: int) -> None:
    import openai

    client = openai.OpenAI(api_key="none", base_url=url)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda body: client.chat.completions.create(**body), bodies))


async def send_async(bodies: list[dict[str, Any]], url: str, workers: int) -> None:
    import openai

    client, gate = openai.AsyncOpenAI(api_key="none", base_url=url), asyncio.Semaphore(workers)

    async def ask(body: dict[str, Any]) -> None:
        async with gate:
            await client.chat.completions.create(**body)

    await asyncio.gather(*map(ask, bodies))


def run_plan(plan: str, path: Path, url: str, workers: int) -> None:
    if plan == "this program":
        module.enrich_dataset(
            path, f"{path}.out", "text", None, LABELS, base_url=url, batch_size=BATCH, max_workers=workers, quiet=True
        )
    elif plan == "one row a call":
        send_in_threads(in_batches(path, 1), url, 1)
    elif plan == "batches in turn":
        send_in_threads(in_batches(path, BATCH), url, 1)
    elif plan == "batches in threads":
        send_in_threads(in_batches(path, BATCH), url, workers)
    elif plan == "AsyncOpenAI and a semaphore":
        asyncio.run(send_async(in_batches(path, BATCH), url, workers))
    elif plan == "this program's requests, bare SDK":
        send_in_threads(sparse_bodies(path), url, workers)


def be_measured(plan: str, path: str, url: str, workers: str) -> None:
    """In a process of its own: run the plan, print its processor seconds, but for imports, and megabytes."""
    import openai  # noqa: F401

    if plan == "this program":
        import genai_prices
        import pandas

        genai_prices.calc_price(genai_prices.Usage(), "gpt-4o-mini")
        pandas.array([])
    started = time.process_time()
    run_plan(plan, Path(path), url, int(workers))
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu": time.process_time() - started, "megabytes": megabytes}))


# --- Measuring --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stand_in(*options: str) -> Iterator[str]:
    command = [sys.executable, str(HERE / "stand_in_server.py"), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().split()[3]
        process.terminate()


def what_was_asked(url: str) -> dict[str, Any]:
    with urlopen(url.replace("/v1", "/stand-in/calls")) as reply:
        return dict(json.load(reply))


def ideal_seconds(latencies: Sequence[float], workers: int) -> float:
    """The calls' latencies, in the order in which they came, on so many workers."""
    free = [0.0] * workers
    for latency in latencies:
        heapq.heappush(free, heapq.heappop(free) + latency)
    return max(free)


def write_rows(path: Path, rows: int) -> Path:
    texts = [text.replace("\n", " ") for text in read_texts(SAMPLE)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows((number, f"{number}: {texts[number % len(texts)]}") for number in range(rows))
    return path


def measure(plan: str, path: Path, workers: int, *options: str) -> list[str]:
    """A line of the table."""
    dense = [] if plan.startswith("this program") else ["--dense"]
    with stand_in(*options, *dense) as url:
        command = [sys.executable, __file__, "--plan", plan, str(path), url, str(workers)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        asked, used = what_was_asked(url), json.loads(run.stdout)
    for leftover in path.parent.glob(f"{path.name}.out*"):
        leftover.unlink()
    wall = asked["ended"] - asked["started"]
    at_once = 1 if plan in {"one row a call", "batches in turn"} else workers
    share = ideal_seconds(asked["latencies"], at_once) / wall
    return [
        plan, str(at_once), f"{wall:.2f}", f"{share:.0%}", f"{asked['calls']:,}", f"{asked['prompt_tokens']:,}",
        f"{asked['completion_tokens']:,}", f"{used['cpu'] / asked['calls'] * 1000:.1f}", f"{used['megabytes']:.0f}",
    ]  # fmt: skip


HEAD = ("plan", "workers", "seconds", "of the ideal", "calls", "tokens in", "tokens out", "CPU ms a call", "MB")


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def print_head(head: Sequence[str], title: str) -> None:
    print(f"\n{title}\n")
    print_row(head)
    print_row(["---"] * len(head))


EVERY_PLAN = (
    "one row a call", "batches in turn", "batches in threads", "AsyncOpenAI and a semaphore",
    "this program's requests, bare SDK", "this program",
)  # fmt: skip


def sample(folder: Path) -> None:
    print_head(HEAD, "The sample's 38 rows, ten labels; 0.4 s to the first token, 12 ms a token:")
    for plan in EVERY_PLAN:
        path = folder / "sample.csv"
        path.write_bytes(SAMPLE.read_bytes())
        print_row(measure(plan, path, 3, "--first-token", "0.4", "--per-token", "0.012"))


LATENCY = ("--first-token", "0.2", "--per-token", "0.004")


def plans(folder: Path) -> None:
    print_head(HEAD, "2,000 rows, ten labels; 0.2 s to the first token, 4 ms a token (the first two: 200 rows):")
    few, many = write_rows(folder / "few.csv", 200), write_rows(folder / "many.csv", 2000)
    for plan in EVERY_PLAN[:2]:
        print_row(measure(plan, few, 1, *LATENCY))
    for workers in (3, 16, 64):
        for plan in EVERY_PLAN[2:]:
            print_row(measure(plan, many, workers, *LATENCY))


def tail(folder: Path) -> None:
    print_head(HEAD, "The same 2,000 rows with a long tail (log-normal, sigma 0.8):")
    many = write_rows(folder / "many.csv", 2000)
    for workers in (3, 16, 64):
        for plan in EVERY_PLAN[4:]:
            print_row(measure(plan, many, workers, *LATENCY, "--tail", "0.8"))


def timed(code: str) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and megabytes of a process of its own."""
    report = "\nimport resource, time\nprint(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    cpu, kilobytes = map(float, run.stdout.split())
    return time.monotonic() - started, cpu, kilobytes / 1024


def sizes(folder: Path) -> None:
    head = ("rows", "seconds", "calls a second", "CPU ms a call", "CPU ms a row", "MB", "MB of pandas", "s to resume")
    print_head(head, "A server that answers at once, 20 rows a call, 16 workers:")
    for rows in (10_000, 100_000, 1_000_000):
        path = write_rows(folder / "big.csv", rows)
        with stand_in() as url:
            code = (
                f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\nimport enrich_dataset\n"
                f"enrich_dataset.main(['--input', {str(path)!r}, '--output', {str(path) + '.out'!r}, '--text-column', 'text',"
                f"'--labels', *{LABELS!r}, '--batch-size', '20', '--max-workers', '16', '--base-url', {url!r}, '--quiet'])"
            )
            wall, cpu, megabytes = timed(code)
            again, _, _ = timed(code)
        _, _, pandas_megabytes = timed(
            f"import pandas\npandas.read_csv({str(path)!r}).to_csv({str(path)!r}, index=False)"
        )
        calls = rows / 20
        print_row([
            f"{rows:,}", f"{wall:.1f}", f"{calls / wall:.0f}", f"{cpu / calls * 1000:.1f}", f"{cpu / rows * 1000:.2f}",
            f"{megabytes:.0f}", f"{pandas_megabytes:.0f}", f"{again:.1f}",
        ])  # fmt: skip
        for leftover in folder.iterdir():
            leftover.unlink()


def limits(folder: Path) -> None:
    head = ("limit", "workers", "calls answered", "calls refused", "seconds", "of the limit's pace")
    print_head(head, "Rate limits, told in headers; a burst of a minute's worth is free:")
    path = write_rows(folder / "many.csv", 13_000)
    for name, amount, option in (
        ("600 requests a minute", 600.0, "--requests-per-minute"),
        ("600,000 tokens a minute", 600_000.0, "--tokens-per-minute"),
    ):
        with stand_in("--first-token", "0.1", option, str(amount)) as url:
            command = [sys.executable, __file__, "--plan", "this program", str(path), url, "32"]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            asked = what_was_asked(url)
        for leftover in folder.glob("*.out*"):
            leftover.unlink()
        good, refused = asked["by_status"]["200"], asked["by_status"].get("429", 0)
        wall = asked["ended"] - asked["started"]
        used = good if "requests" in name else asked["charged_tokens"]
        pace = (used - amount) / amount * 60 / wall  # what came after the free burst, over the time it took
        print_row([name, "32", f"{good:,}", f"{refused / (good + refused):.1%}", f"{wall:.1f}", f"{pace:.1%}"])


PARTS = {part.__name__: part for part in (sample, plans, tail, sizes, limits)}


def main(chosen: Sequence[str]) -> None:
    print(
        f"Python {platform.python_version()}, openai {version('openai')}, pandas {version('pandas')}, "
        f"{time.strftime('%F')}; tokens are counted by the stand-in, by a rule of its own, the schema included."
    )
    for name in chosen or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plan"]:
        be_measured(*sys.argv[2:])
    else:
        main(sys.argv[1:])
