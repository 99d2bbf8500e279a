"""Store: every answer that was paid for, kept beside the output, whatever ends the program."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from conftest import LABELS, ROOT, Bench, make_row, make_texts, prompt_of
from stand_in_server import StandIn

import enrich_dataset as module


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


def test_a_second_process_on_one_output_is_refused_and_the_first_goes_on(bench: Bench) -> None:
    bench.server.model.first_token = 0.6
    first = bench.write(make_texts(80)).process()
    bench.wait_in_flight()
    second = bench.process()
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 2
    assert "cannot be used: database is locked. If another run is using it, wait for that; " in errors
    assert first.wait(60) == 0
    first.communicate()
    bench.check()
    assert sorted(bench.asked) == sorted(bench.texts)


class TestDiskFailures:
    def test_a_store_that_cannot_be_written_stops_the_run_at_once(self, bench: Bench) -> None:
        bench.write(make_texts(200)).enrich(limit=20)
        with contextlib.closing(sqlite3.connect(bench.store)) as db:
            db.execute("CREATE TRIGGER full BEFORE INSERT ON attempts BEGIN SELECT raise(ABORT, 'disk full'); END")
        with pytest.raises(module.EnrichmentError, match=r"The store .* failed"):
            bench.enrich(max_workers=1)
        assert len(bench.server.calls) <= 2 + 2
        assert len([cells for cells in bench.cells if "" not in cells]) == 20

    def test_a_read_only_store_is_told_as_that(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(["cake"]).enrich()
        bench.store.chmod(0o400)
        assert bench.command() == 2
        assert "is read-only: allow writing to it and to its folder." in capsys.readouterr().err


def test_no_key_and_no_text_is_in_the_store(bench: Bench) -> None:
    bench.write(["my secret cake", "poison-refusal secret"]).enrich(api_key="sk-very-secret")
    files = [path for path in Path(bench.store.parent).iterdir() if "answers" in path.name]
    assert files
    assert not any(b"secret" in path.read_bytes() for path in files)


WHEN = datetime(2026, 1, 1, tzinfo=UTC)


PROMPT = prompt_of()


ROW = make_row("cake")


TABLE = module.read_table(pd.DataFrame({"text": ["cake", "tram"]}), module.Columns("text", (), ()))


def attempt(labels: tuple[str, ...] = tuple(LABELS)) -> module.Attempt:
    return module.Attempt((ROW,), prompt_of(labels), reply=module.Reply(200, {}, {"model": "m-1"}, 0.0))


def done(answers: dict[module.Row, str]) -> module.Verdict:
    return module.Verdict(module.Action.DONE, answers=answers)


def known(store: module.Store) -> list[list[int]]:
    """The cells of TABLE, by what the store has."""
    return store.cells(PROMPT, TABLE)[TABLE.key_indexes].tolist()


class TestNewStore:
    def test_it_is_readable_by_its_owner_only(self, bench: Bench) -> None:
        bench.write(["cake"]).enrich()
        assert stat.S_IMODE(bench.store.stat().st_mode) == 0o600

    def test_it_holds_no_answer(self, tmp_path: Path) -> None:
        with module.Store(tmp_path / "store") as store:
            assert known(store) == [[-1] * 3] * 2

    def test_another_path_can_be_named(self, bench: Bench, tmp_path: Path) -> None:
        bench.write(["cake"]).enrich(store_filepath=tmp_path / "elsewhere.sqlite3")
        assert (tmp_path / "elsewhere.sqlite3").exists()
        assert not bench.store.exists()

    def test_calls_are_told_with_their_figures(self, bench: Bench) -> None:
        bench.write([*make_texts(15), "poison-garbage"]).enrich()
        with sqlite3.connect(bench.store) as db:
            rows = db.execute(
                "SELECT requested, model_served, system_fingerprint, prompt_tokens, outcome FROM attempts"
            ).fetchall()
        assert (10, "gpt-4o-mini-2024-07-18", "fp_stand_in") in [row[:3] for row in rows]
        # A request that has waited for others is recorded with its bill, and without one when it is settled.
        assert sum(row[3] or 0 for row in rows) == sum(call.prompt_tokens for call in bench.server.calls)
        assert {row[4] for row in rows} == {"answered", "the answer was not valid JSON"}


class TestReopenedStore:
    def test_the_newest_answer_stands(self, tmp_path: Path) -> None:
        for cells in ("000", "101"):
            with module.Store(tmp_path / "store") as store:
                store.record(attempt(), done({ROW: cells}), WHEN)
        with module.Store(tmp_path / "store") as store:
            assert known(store) == [[1, 0, 1], [-1] * 3]

    def test_answers_to_several_questions_are_put_together(self, tmp_path: Path) -> None:
        parts = {(LABELS[2],): "1", (LABELS[0],): "0"}
        with module.Store(tmp_path / "store") as store:
            for labels, cells in parts.items():
                store.record(attempt(labels), done({ROW: cells}), WHEN)
            assert known(store) == [[0, -1, 1], [-1] * 3]


class TestNotAStore:
    def test_a_text_file_is_refused_and_kept(self, bench: Bench) -> None:
        bench.write(["cake"])
        bench.store.write_text("my notes, which are long enough to be no empty database file at all" * 20)
        with pytest.raises(module.InputError, match="is not an answer store"):
            bench.enrich()
        assert bench.store.read_text().startswith("my notes")

    @pytest.mark.parametrize("damage", ["truncated", "overwritten", "short"])
    def test_a_damaged_store_is_told_in_sqlites_words_and_is_to_be_kept(self, bench: Bench, damage: str) -> None:
        """On a disk that errs or that synchronises files by itself: it may be most of what was paid for."""
        bench.write(make_texts(400)).enrich(batch_size=1)
        content = bench.store.read_bytes()
        damaged = {
            "truncated": content[: len(content) // 2],
            "overwritten": content[:100] + bytes(len(content) - 100),
            "short": content[:50],
        }
        bench.store.write_bytes(damaged[damage])
        with pytest.raises(module.EnrichmentError, match=r"(malformed|not a database|disk I/O)") as told:
            bench.enrich(fresh=True)
        assert "delete" not in str(told.value)
        assert re.search("paid answers|what it holds is kept", str(told.value))
        assert bench.store.exists()

    def test_of_runs_that_start_together_one_gets_the_new_store(self, tmp_path: Path) -> None:
        code = (
            "import enrich_dataset as m, pathlib, sys, time\nfolder = pathlib.Path(sys.argv[1])\n"
            "(folder / sys.argv[2]).touch()\nwhile not (folder / 'go').exists():\n    time.sleep(0.01)\n"
            "with m.Store(folder / 'store'):\n    time.sleep(2)"
        )
        commands = [[sys.executable, "-c", code, str(tmp_path), str(number)] for number in range(4)]
        started = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
        while len(list(tmp_path.iterdir())) < 4:
            time.sleep(0.02)
        (tmp_path / "go").touch()
        errors = [process.communicate()[1] for process in started]
        assert [process.returncode for process in started].count(0) == 1
        assert sum("database is locked" in text for text in errors) == 3

    def test_a_store_that_a_full_disk_left_empty_is_no_strangers_file(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(["cake"])
        command = [sys.executable, str(ROOT / "enrich_dataset.py"), *bench.arguments("--base-url", bench.server.url)]
        bare = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        limit = (0, resource.RLIM_INFINITY)
        run = subprocess.run(
            command, env=bare, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert run.returncode == 2
        assert "is not an answer store" not in run.stderr
        bench.enrich()
        bench.check()

    def test_another_programs_database_is_refused_and_not_touched(self, bench: Bench) -> None:
        with contextlib.closing(sqlite3.connect(bench.store)) as db:
            db.execute("CREATE TABLE notes (text)")
        before = bench.store.read_bytes()
        with pytest.raises(module.InputError, match="is not an answer store"):
            bench.write(["cake"]).enrich()
        assert bench.store.read_bytes() == before

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                "user_version = 99",
                "another version of this program: keep it for that one, and pass another file as store",
            ),
            ("application_id = 7", "is not an answer store"),
        ],
    )
    def test_another_programs_or_versions_database_is_refused(self, bench: Bench, change: str, words: str) -> None:
        bench.write(["cake"]).enrich()
        db = sqlite3.connect(bench.store)
        db.execute(f"PRAGMA {change}")
        db.close()
        before = bench.store.read_bytes()
        with pytest.raises(module.InputError, match=words):
            bench.enrich()
        assert bench.store.read_bytes() == before

    def test_a_store_that_cannot_be_made_is_refused(self, bench: Bench) -> None:
        with pytest.raises(module.InputError, match="no folder"):
            bench.write(["cake"]).enrich(store_filepath="/no/such/folder/store")
        with pytest.raises(module.InputError, match="cannot be used"):
            bench.enrich(store_filepath=bench.input.parent / ("x" * 300))
        bench.store.symlink_to(bench.input.parent / "nowhere" / "store")
        with pytest.raises(module.InputError, match="cannot be created"):
            bench.enrich()


class TestFullDisk:
    def test_a_full_disk_is_one_line_and_loses_nothing_that_was_kept(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich()
        with module.Store(bench.store) as store:
            store.db.execute("PRAGMA max_page_count = 1")
            many = {make_row(str(number)): "000" for number in range(5000)}
            with pytest.raises(module.EnrichmentError, match=r"failed \(database or disk is full\)"):
                store.record(attempt(), done(many), WHEN)
        bench.enrich()
        assert len(bench.server.calls) == 2


SECOND = {
    "server": ({}, "server {server}"),
    "model": ({"model": "gpt-6-luna"}, "model gpt-4o-mini"),
    "definition": ({"labels": {LABELS[0]: "a meaning"}}, "definitions"),
    "instructions": ({"instructions": "Be strict."}, "instructions"),
    "examples": ({"examples": pd.DataFrame([["tram", 0, 0, 0]], columns=["text", *LABELS])}, "examples"),
    "extra body": ({"extra_body": {"seed": 1}}, "extra body {{}}"),
    "label column": ({"label_column": "id"}, "context []"),
    "answer form": ({"answer_form": "each"}, "answer form list"),
}


class TestOtherQuestions:
    @pytest.mark.parametrize("name", SECOND)
    def test_answers_of_another_server_model_or_prompt_do_not_count_and_that_is_said_first(
        self, bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options, words = SECOND[name]
        options = {"labels": LABELS, "model": "gpt-4o-mini", "label_column": None} | options
        bench.write(make_texts(20)).enrich()
        with StandIn() as other:
            url = other.url if name == "server" else bench.server.url
            labels, label_column = options.pop("labels"), options.pop("label_column")
            module.enrich_dataset(bench.input, bench.output, "text", label_column, labels, base_url=url, **options)
            asked = [text for call in other.calls for text in call.texts] or bench.asked[20:]
            words = words.format(server=bench.server.url[7:], other=other.url[7:])
        assert sorted(asked) == sorted(bench.texts)
        printed = capsys.readouterr().out
        line = next(line for line in printed.splitlines() if re.search(rf"{re.escape(words)}( +|: )20 ", line))
        assert ("=== The same labels by other models" in printed) == (label_column is None)
        assert printed.index(line) < printed.index("Total batches to process: ")
        assert "Rows already labelled" not in printed

    def test_few_answers_of_another_model_are_one_line(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(make_texts(40)).enrich(limit=9)
        bench.enrich(model="gpt-6-luna", instructions="Be strict.", quiet=False)
        told = (
            "Answers that the store has to other questions do not count (model gpt-4o-mini and instructions: 9 rows)\n"
        )
        assert told in capsys.readouterr().out

    def test_nothing_is_said_where_all_answers_count(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(make_texts(20)).enrich(limit=10)
        bench.enrich(audit=3, quiet=False)
        bench.write(make_texts(30)).enrich(quiet=False)
        assert "stored answers" not in capsys.readouterr().out

    def test_a_fallback_of_the_server_changes_no_question(self, bench: Bench) -> None:
        bench.server.gate.refuses = {"json_schema", "json_object", "temperature"}
        bench.write(make_texts(20)).enrich()
        bench.server.gate.refuses = set()
        bench.server.calls.clear()
        bench.enrich()
        assert bench.server.calls == []

    def test_the_same_server_is_known_by_any_way_to_write_it(self) -> None:
        urls = ("https://user:pass@API.openai.com/v1", "https://api.openai.com:443/v1/")
        frame = pd.DataFrame({"text": []})
        servers = [
            module.Server(module.frame_options(frame, "text", ["a"], base_url=url), module.Timing()) for url in urls
        ]
        assert {server.address for server in servers} == {"api.openai.com/v1"}

    def test_what_decides_an_answer_stands_in_plain_columns_and_examples_as_number_and_digest(
        self, bench: Bench
    ) -> None:
        examples = pd.DataFrame([["a secret example", 0, 0, 0]], columns=["text", *LABELS])
        bench.write(["cake"]).enrich(dict.fromkeys(LABELS, "a meaning"), instructions="Be strict.", examples=examples)
        with sqlite3.connect(bench.store) as db:
            columns = [name for _, name, *_ in db.execute("PRAGMA table_info(questions)")]
            rows = [dict(zip(columns, row, strict=True)) for row in db.execute("SELECT * FROM questions")]
        db.close()
        assert [row["label"] for row in rows] == LABELS
        assert {row["definition"] for row in rows} == {"a meaning"}
        assert {(row["server"], row["model"]) for row in rows} == {(bench.server.url[7:], "gpt-4o-mini")}
        assert {(row["instructions"], row["examples"]) for row in rows} == {("Be strict.", 1)}
        assert b"secret" not in bench.store.read_bytes()

    def test_other_words_of_ours_have_another_version(self) -> None:
        words = module.WORDING + str(module.TASKS) + str(module.SHAPES) + module.LABEL_NOTE + module.CONTEXT_NOTE
        versions = {3: "cda3c71e0f6c6bf8"}
        found = {module.WORDING_VERSION: hashlib.sha256(words.encode()).hexdigest()[:16]}
        assert found == versions, "the wording changed: raise WORDING_VERSION, and note the new digest here"
