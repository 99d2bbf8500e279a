"""What must survive: storms of faults, limits, kills and signals; full disks, other stores, jumping clocks.

python tests/test_chaos.py --storms 50    # prints the figures that the README gives
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import FORMS, LABELS, ROOT, Bench, expected, make_texts  # noqa: E402
from stand_in_model import FAULTS  # noqa: E402
from stand_in_server import StandIn  # noqa: E402

import enrich_dataset as module  # noqa: E402

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


def limit_files(size: int) -> Any:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [4_000, 30_000, 60_000])
def test_a_full_disk_is_one_line_and_room_ends_the_job(bench: Bench, size: int) -> None:
    """Files may not grow past `size`: the store cannot be created, fails later, or the CSV cannot be written."""
    bench.write([text * 10 for text in make_texts(300)])
    program = [
        sys.executable,
        str(ROOT / "enrich_dataset.py"),
        *bench.arguments("--base-url", bench.server.url, "--quiet"),
    ]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # it writes files too
    run = subprocess.run(program, preexec_fn=limit_files(size), env=bare, capture_output=True, text=True, check=False)
    assert run.returncode in {1, 2}
    assert run.stderr.startswith("Error: ")
    assert run.stderr.count("\n") == 1
    assert not bench.output.exists()
    assert not list(bench.output.parent.glob("*.tmp"))
    paid = kept(bench)
    before = len(bench.server.calls)
    bench.enrich()
    bench.check()
    assert sum(len(call.texts) for call in bench.server.calls[before:]) == 300 - paid


def kept(bench: Bench) -> int:
    """The answers in the store, if that can be read."""
    if not bench.store.exists() or not bench.store.stat().st_size:
        return 0
    with contextlib.closing(sqlite3.connect(bench.store)) as db:
        found = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'attempts'").fetchone()[0]
        return (
            int(db.execute("SELECT coalesce(sum(length(answers)), 0) / 3 FROM attempts").fetchone()[0]) if found else 0
        )


def test_an_output_that_is_open_elsewhere_is_one_line_and_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Windows does while Excel has the file open."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    bench.write(make_texts(40))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        assert bench.command("--quiet") == 1
    errors = capsys.readouterr().err
    assert errors == (
        f"Error: {bench.output} cannot be written (Permission denied): close the program that has it open, or free some space, "
        "then run the same command; no answers are lost.\n"
    )
    calls = len(bench.server.calls)
    assert bench.command("--quiet") == 0
    assert len(bench.server.calls) == calls
    bench.check()


@pytest.mark.skipif("sys.platform == 'win32'")
def test_an_output_in_a_folder_that_takes_no_file_is_one_line(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.output = Path("/proc/self/out.csv")
    assert bench.write(["cake"]).command("--store", str(bench.store), "--quiet") == 2
    assert "The output /proc/self/out.csv could not be written (" in capsys.readouterr().err
    assert bench.server.calls == []


def test_a_store_of_another_version_is_refused_and_left_alone(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(["cake"]).enrich()
    with contextlib.closing(sqlite3.connect(bench.store)) as db:
        db.execute("PRAGMA user_version = 999")
    before = bench.store.read_bytes()
    assert bench.command() == 2
    assert (
        "was written by another version of this program: keep it for that one, and pass another file as --store."
        in capsys.readouterr().err
    )
    assert bench.store.read_bytes() == before


@pytest.mark.parametrize("start", [0, 50, 4_096, 8_192])
def test_a_corrupted_store_is_one_line_and_asks_nothing(
    bench: Bench, start: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(make_texts(200)).enrich(quiet=True)
    calls, output = len(bench.server.calls), bench.output.read_bytes()
    content = bytearray(bench.store.read_bytes())
    content[start : start + 4_000] = random.Random(start).randbytes(4_000)
    bench.store.write_bytes(content)
    assert bench.command("--quiet") in {1, 2}
    errors = capsys.readouterr().err
    assert errors.startswith(f"Error: The store {bench.store} ")
    assert errors.count("\n") == 1
    assert len(bench.server.calls) == calls
    assert bench.output.read_bytes() == output


@pytest.mark.parametrize("skew", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_nothing(bench: Bench, skew: float) -> None:
    bench.server.script.append((429, {"retry-after": formatdate(time.time() + 1, usegmt=True)}, {}))
    bench.timing = module.Timing(utc_now=lambda: datetime.now(UTC) + timedelta(seconds=skew * len(bench.server.calls)))
    bench.write(make_texts(40)).enrich()
    bench.check()


@pytest.mark.parametrize("skew", [-86_400.0, 86_400.0])
def test_a_job_is_found_again_whatever_the_two_clocks_say(bench: Bench, skew: float) -> None:
    bench.server.batches.clock_skew = skew
    bench.server.batches.hold_at = "created"
    bench.server.batches.seconds = 0.1
    process = bench.write(make_texts(40)).process("--batch-api", "--poll-interval", "0.1")
    assert bench.server.batches.held.wait(30)
    process.kill()
    process.communicate()
    bench.server.batches.let_go.set()
    bench.enrich(use_batch_api=True, poll_interval=0.05)
    bench.check()
    assert len(bench.server.batches.jobs) == 1


def test_a_second_process_on_one_output_is_refused_and_the_first_goes_on(bench: Bench) -> None:
    bench.server.model.first_token = 0.6
    first = bench.write(make_texts(200)).process()
    bench.wait_in_flight()
    second = bench.process()
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 2
    assert "cannot be used: database is locked. If another run is using it, wait for that; " in errors
    assert first.wait(60) == 0
    first.communicate()
    bench.check()
    assert sorted(bench.asked) == sorted(bench.texts)


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
