"""Storms: runs among faults, limits, kills and signals, which end with right cells and lose nothing that was paid.

python tests/test_storms.py --storms 50    # prints the figures that the README gives
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import FORMS, LABELS, Bench, expected, make_texts  # noqa: E402
from stand_in_model import FAULTS  # noqa: E402
from stand_in_server import StandIn  # noqa: E402

WORKERS, BATCH = 6, 10


def storm(folder: Path, seed: int, rows: int = 400) -> Counter[str]:
    """A job among faults, limits and signals until it ends, and then without them; what was seen."""
    dice, seen = random.Random(seed), Counter(storms=1)
    with StandIn(first_token=0.01, tail=1.0) as server:
        server.random.seed(seed)
        server.faults.shares = dict.fromkeys(FAULTS, 0.02)
        server.limits.are_told = dice.random() < 0.5
        server.limits.set("requests", 6000, burst=dice.choice([5, 50, 500]))
        bench = Bench(folder, server, FORMS[seed % 3]).write(make_texts(rows))
        options = ["--max-workers", str(WORKERS), "--batch-size", str(BATCH), "--timeout", "5", "--quiet"]
        options += ["--batch-api", "--poll-interval", "0.1"] * (seed % 4 == 3)
        server.batches.seconds = 0.1
        for _ in range(4):
            arrived = server.arrived
            process = bench.process(*options)
            bench.wait_until_it_calls(process, arrived)  # a signal before that may find a module half imported
            signalled = dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            try:
                process.wait(dice.random() * 2)
            except subprocess.TimeoutExpired:
                process.send_signal(signalled)
                seen["killed" if signalled == signal.SIGKILL else "told to stop"] += 1
            _, errors = process.communicate(timeout=60)
            assert "Traceback" not in errors
            assert_nothing_wrong(bench)
        seen["faults"] = sum(bool(call.fault) for call in server.calls)
        seen["refused for the rate"] = sum(call.status == 429 and not call.fault for call in server.calls)
        server.faults.shares = {}
        ended = bench.process(*options)
        _, errors = ended.communicate(timeout=120)
        assert ended.returncode == 0, errors
        bench.check()
        count_answers(bench, seen)
    return seen


def assert_nothing_wrong(bench: Bench) -> None:
    """The CSV, if there is one by now, is whole, and each cell in it is right or blank."""
    if bench.output.exists():
        assert len(bench.cells) == len(bench.texts)
        for cells, right in zip(bench.cells, expected(bench.texts, form=bench.form), strict=True):
            assert cells in (right, [""] * len(LABELS))


def count_answers(bench: Bench, seen: Counter[str]) -> None:
    """Answers that were paid are in the store, or were in flight when the program was killed."""
    whole = Counter(text for call in bench.server.calls if call.status == 200 and not call.fault for text in call.texts)
    twice = sum(whole.values()) - len(whole)
    seen["answers"] += sum(whole.values())
    seen["answers paid twice"] += twice
    seen["most that may be"] += seen["killed"] * WORKERS * BATCH
    assert twice <= seen["killed"] * WORKERS * BATCH


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_leaves_no_wrong_cell_and_loses_nothing(tmp_path: Path, seed: int) -> None:
    storm(tmp_path, seed, rows=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storms", type=int, default=50)
    total: Counter[str] = Counter()
    for seed in range(parser.parse_args().storms):
        with tempfile.TemporaryDirectory() as folder:
            total.update(storm(Path(folder), seed))
    print(", ".join(f"{name}: {count:,}" for name, count in total.items()))


if __name__ == "__main__":
    main()
