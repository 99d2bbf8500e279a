"""What the plan costs in time, calls and tokens: measured side by side in one run.

    python tests/benchmark.py

The 38 rows of the sample with ten labels, against the stand-in server (0.4 s to the first token, 12 ms a
token), by the plans that a person would write and by this program; and the ideal, which is the calls' own
latency packed on the workers with nothing between them. Then a large table against a server that answers
at once: processor time and memory a call.
"""

from __future__ import annotations

import csv
import heapq
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import openai  # noqa: E402
import pandas as pd  # noqa: E402
from stand_in_server import Call, StandIn  # noqa: E402

import enrich_dataset as module  # noqa: E402
from example_usage import LABELS  # noqa: E402

FIRST_TOKEN, PER_TOKEN = 0.4, 0.012
SAMPLE = HERE.parent / "HatefulData.csv"


def ask_densely(client: openai.OpenAI, texts: list[str]) -> None:
    """A call as a person would write it: every label of every text is answered with 0 or 1."""
    names = "\n".join(f"- {json.dumps(label)}" for label in LABELS)
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts, 1)]
    client.chat.completions.create(
        model="gpt-4o-mini",
        temperature=0,
        response_format={"type": "json_object"},
        messages=[
            {"role": "system", "content": f"Answer in json, for each id and label 0 or 1.\n{names}"},
            {"role": "user", "content": json.dumps({"texts": rows})},
        ],
    )


def plan(batch_size: int, workers: int) -> Callable[[StandIn], None]:
    def run(server: StandIn) -> None:
        texts = pd.read_csv(SAMPLE)["text"].tolist()
        batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        client = openai.OpenAI(api_key="none", base_url=server.url)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda batch: ask_densely(client, batch), batches))

    return run


def this_program(server: StandIn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        module.enrich_dataset(
            SAMPLE, Path(folder) / "out.csv", "text", "label", LABELS, base_url=server.url, quiet=True
        )


def ideal_seconds(calls: list[Call], workers: int) -> float:
    """The calls' own latencies, in the order in which they left, on so many workers."""
    free = [0.0] * workers
    for call in sorted(calls, key=lambda call: call.at):
        heapq.heappush(free, heapq.heappop(free) + FIRST_TOKEN + PER_TOKEN * call.completion_tokens)
    return max(free)


def compare_plans() -> None:
    print("| plan | seconds | calls | tokens in | tokens out |\n|---|---|---|---|---|")
    plans = {
        "one row a call, one call at a time, dense answer": plan(1, 1),
        "ten rows a call, one call at a time, dense answer": plan(10, 1),
        "ten rows a call, three at a time, dense answer": plan(10, 3),
        "this program: ten rows a call, three at a time": this_program,
    }
    for name, run in plans.items():
        with StandIn(first_token=FIRST_TOKEN, per_token=PER_TOKEN, dense=run is not this_program) as server:
            run(server)
            calls = server.calls
        wall = max(call.ended for call in calls) - min(call.at for call in calls)
        tokens = [sum(getattr(call, part) for call in calls) for part in ("prompt_tokens", "completion_tokens")]
        print(f"| {name} | {wall:.2f} | {len(calls)} | {tokens[0]:,} | {tokens[1]:,} |")
    ideal = ideal_seconds(calls, 3)
    print(f"| the ideal: this program's calls with nothing between them | {ideal:.2f} | | | |")
    print(f"\nThis program's wall time is {wall / ideal:.1%} of the ideal.")


BIG_TABLE = """
import resource, sys, time
sys.path.insert(0, {root!r})
before = time.process_time()
{work}
used = resource.getrusage(resource.RUSAGE_SELF)
print(time.process_time() - before, used.ru_maxrss / 1024)
"""
ENRICH = """
import enrich_dataset
enrich_dataset.main(["--input", {path!r}, "--output", {path!r} + ".out", "--text-column", "text", "--labels",
    *{labels!r}, "--batch-size", "20", "--max-workers", "16", "--base-url", {url!r}, "--quiet"])
"""
PANDAS = """
import pandas
pandas.read_csv({path!r}).to_csv({path!r} + ".pandas", index=False)
"""


def measure(work: str, **values: object) -> tuple[float, float]:
    """Processor seconds and megabytes of a process of its own."""
    program = BIG_TABLE.format(root=str(HERE.parent), work=work.format(**values))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, run.stdout.split())
    return seconds, megabytes


def measure_a_big_table(rows: int = 200_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "big.csv")
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text"])
            writer.writerows((i, f"Some text of middling length about a tram and its people, {i}") for i in range(rows))
        command = [sys.executable, str(HERE / "stand_in_server.py"), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            url = server.stdout.readline().split()[3]
            started = time.monotonic()
            seconds, megabytes = measure(ENRICH, path=path, labels=LABELS, url=url)
            wall = time.monotonic() - started
            again, _ = measure(ENRICH, path=path, labels=LABELS, url=url)
            server.terminate()
        _, pandas_megabytes = measure(PANDAS, path=path)
    calls = rows // 20
    print(f"\n{rows:,} rows, 20 a call, a server that answers at once: {seconds / calls * 1000:.1f} ms of processor")
    print(f"time a call ({calls / wall:.0f} calls a second), {megabytes:.0f} MB, against {pandas_megabytes:.0f} MB")
    print(f"of pandas reading and writing the file. The same command again, with nothing to ask: {again:.1f} s.")


if __name__ == "__main__":
    print(
        f"Python {platform.python_version()}, openai {openai.__version__}, pandas {pd.__version__}, {time.strftime('%F')}\n"
    )
    compare_plans()
    measure_a_big_table()
