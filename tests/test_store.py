"""The answer store, by situation."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pandas as pd
import pytest
from conftest import LABELS, Job, make_texts

import enrich_dataset as module

QUESTION = module.build_question(module.Prompt("m", False), tuple(LABELS))
ROW = module.make_row("cake", None)


TABLE = module.read_table(pd.DataFrame({"text": ["cake", "tram"]}), module.Columns("text", None, ()))


def attempt(labels: tuple[str, ...] = tuple(LABELS)) -> module.Attempt:
    question = module.build_question(module.Prompt("m"), labels)
    return module.Attempt(module.Request((ROW,), question), body={"model": "m-1"})


def known(store: module.Store) -> list[list[int]]:
    """The cells of TABLE, by what the store has."""
    return store.known(QUESTION, TABLE)[TABLE.key_indexes].tolist()


class TestFresh:
    def test_it_is_readable_by_its_owner_only(self, job: Job) -> None:
        job.write(["cake"]).enrich()
        assert stat.S_IMODE(job.store.stat().st_mode) == 0o600

    def test_it_knows_nothing(self, tmp_path: Path) -> None:
        with module.Store(tmp_path / "store") as store:
            assert known(store) == [[-1] * 3] * 2

    def test_another_path_can_be_named(self, job: Job, tmp_path: Path) -> None:
        job.write(["cake"]).enrich(store_filepath=tmp_path / "elsewhere.sqlite3")
        assert (tmp_path / "elsewhere.sqlite3").exists()
        assert not job.store.exists()

    def test_calls_are_told_with_their_figures(self, job: Job) -> None:
        job.write([*make_texts(15), "poison-garbage"]).enrich()
        with sqlite3.connect(job.store) as db:
            rows = db.execute(
                "SELECT requested, model_served, system_fingerprint, prompt_tokens, outcome FROM attempts"
            ).fetchall()
        assert (10, "gpt-4o-mini-2024-07-18", "fp_stand_in") in [row[:3] for row in rows]
        assert sum(row[3] for row in rows) == sum(call.prompt_tokens for call in job.server.calls)
        assert {row[4] for row in rows} == {"answered", "no row answered"}


class TestReopened:
    def test_the_newest_answer_stands(self, tmp_path: Path) -> None:
        for cells in ("000", "101"):
            with module.Store(tmp_path / "store") as store:
                store.record(attempt(), {ROW: cells})
        with module.Store(tmp_path / "store") as store:
            assert known(store) == [[1, 0, 1], [-1] * 3]

    def test_answers_to_several_questions_are_put_together(self, tmp_path: Path) -> None:
        parts = {(LABELS[2],): "1", (LABELS[0],): "0"}
        with module.Store(tmp_path / "store") as store:
            for labels, cells in parts.items():
                store.record(attempt(labels), {ROW: cells})
            assert known(store) == [[0, -1, 1], [-1] * 3]


class TestTwoRuns:
    def test_a_second_run_on_the_same_store_is_refused(self, job: Job) -> None:
        job.write(["cake"])
        with module.Store(job.store), pytest.raises(module.InputError, match="in use by another run"):
            job.enrich()
        assert job.server.calls == []


class TestNotAStore:
    def test_a_text_file_is_refused_and_kept(self, job: Job) -> None:
        job.write(["cake"])
        job.store.write_text("my notes, which are long enough to be no empty database file at all" * 20)
        with pytest.raises(module.InputError, match="is not an answer store"):
            job.enrich()
        assert job.store.read_text().startswith("my notes")

    @pytest.mark.parametrize("change", ["PRAGMA user_version = 99", "PRAGMA application_id = 7"])
    def test_another_programs_or_versions_database_is_refused(self, job: Job, change: str) -> None:
        job.write(["cake"]).enrich()
        db = sqlite3.connect(job.store)
        db.execute(change)
        db.close()
        with pytest.raises(module.InputError, match="is not an answer store"):
            job.enrich()

    def test_a_store_that_cannot_be_made_is_refused(self, job: Job) -> None:
        with pytest.raises(module.InputError, match="no folder"):
            job.write(["cake"]).enrich(store_filepath="/no/such/folder/store")
        with pytest.raises(module.InputError, match="cannot be used"):
            job.enrich(store_filepath=job.input.parent / ("x" * 300))
        job.store.symlink_to(job.input.parent / "nowhere" / "store")
        with pytest.raises(module.InputError, match="cannot be created"):
            job.enrich()


class TestFailing:
    def test_a_full_disk_is_one_line_and_loses_nothing_that_was_kept(self, job: Job) -> None:
        job.write(make_texts(20)).enrich()
        with module.Store(job.store) as store:
            store.db.execute("PRAGMA max_page_count = 1")
            many = {module.make_row(str(number), None): "000" for number in range(5000)}
            with pytest.raises(module.EnrichmentError, match=r"failed \(database or disk is full\)"):
                store.record(attempt(), many)
        job.enrich()
        assert len(job.server.calls) == 2
