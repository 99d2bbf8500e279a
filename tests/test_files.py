"""Files: nothing of the user is overwritten, each file is whole, and keeps its mode."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, ROOT, Bench, make_texts
from stand_in_server import StandIn

import enrich_dataset as module


def limit_files(size: int) -> Any:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def kept(bench: Bench) -> int:
    """The answers in the store, if that can be read."""
    if not bench.store.exists() or not bench.store.stat().st_size:
        return 0
    with contextlib.closing(sqlite3.connect(bench.store)) as db:
        found = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'attempts'").fetchone()[0]
        return (
            int(db.execute("SELECT coalesce(sum(length(answers)), 0) / 3 FROM attempts").fetchone()[0]) if found else 0
        )


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


def refused(bench: Bench, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that sent and changed nothing."""
    before = {path: path.read_bytes() for path in bench.input.parent.rglob("*") if path.is_file()}
    calls = len(bench.server.calls)
    capsys.readouterr()
    assert bench.command(*arguments) == 2
    assert {path: path.read_bytes() for path in bench.input.parent.rglob("*") if path.is_file()} == before
    assert len(bench.server.calls) == calls
    line = capsys.readouterr().err
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    return line


class TestOverwriting:
    @pytest.mark.parametrize("name", ["out.csv", "out.csv.run.json", "out.csv.disagreements.csv", "plot.png"])
    def test_a_file_that_the_program_did_not_write_is_kept(
        self, bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(["cake"])
        gold = bench.input.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\ncake,1\n")
        (bench.input.parent / name).write_text("precious")
        arguments = ["--gold", str(gold), "--plot", str(bench.input.with_name("plot.png"))]
        line = refused(bench, capsys, *arguments)
        assert f"{name} was not written by a run on this store, and would be lost" in line
        assert "or pass --overwrite." in line
        assert bench.command("--overwrite", *arguments) == 0
        assert (bench.input.parent / name).read_bytes() != b"precious"

    def test_corrections_by_hand_are_kept_and_become_the_input(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(["cake", "violence"]).enrich()
        corrected = bench.output.read_text().replace("0,0,0", "0,1,0")
        bench.output.write_text(corrected)
        line = refused(bench, capsys)
        assert "was changed since it was written, and would be lost" in line
        assert "make it the input of a run with another output: existing 0 and 1 cells are kept." in line
        other = bench.output.with_name("other.csv")
        module.enrich_dataset(bench.output, other, "text", None, LABELS, base_url=bench.server.url, quiet=True)
        assert other.read_text() == corrected

    def test_a_dry_run_says_so_too_and_allows_nothing_for_later(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(["cake"]).enrich()
        bench.output.write_text("mine")
        refused(bench, capsys, "--dry-run")
        assert bench.command("--dry-run", "--overwrite") == 0
        refused(bench, capsys)

    def test_a_kill_between_the_note_and_the_move_is_no_change_of_the_users(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for limit in (2, 4, 6):
            with monkeypatch.context() as patch:

                def kill(*_: object) -> None:
                    patch.setattr(Path, "unlink", lambda *_, **__: None)
                    raise KeyboardInterrupt

                patch.setattr(Path, "replace", kill)
                with pytest.raises(KeyboardInterrupt):
                    bench.write(make_texts(10)).enrich(limit=limit)
        bench.enrich()
        bench.check()
        assert not [path for path in bench.output.parent.iterdir() if path.suffix == ".tmp"]

    def test_folders_can_be_moved_and_outputs_share_a_store(self, bench: Bench, tmp_path: Path) -> None:
        bench.write(make_texts(5)).enrich()
        module.enrich_dataset(
            bench.input, tmp_path / "second.csv", "text", None, LABELS[:1], store_filepath=bench.store, quiet=True,
            base_url=bench.server.url, model="gpt-4o-mini",
        )  # fmt: skip
        moved = tmp_path / "moved"
        moved.mkdir()
        for path in (bench.input, bench.output, bench.store, Path(f"{bench.output}.run.json")):
            path.rename(moved / path.name)
        again = Bench(moved, bench.server).write([*make_texts(5), "cake"])
        again.enrich()
        again.check()
        assert len(bench.asked) == 6


class TestRefused:
    @pytest.mark.parametrize("name", ["out.xlsx", "out.parquet", "out.JSONL"])
    def test_an_output_that_is_no_regular_file_is_refused(
        self, bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(bench.write(["cake"]), capsys, "--output", str(bench.output.with_name(name)))
        assert f"{name} is always CSV: use a name that ends in .csv" in line

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("table.xlsx", "convert it with pandas.read_excel("),
            ("table.jsonl", ".jsonl', lines=True).to_csv("),
            ("table.parquet", "table.csv', index=False)."),
        ],
    )
    def test_an_input_that_is_no_regular_file_is_refused(
        self, bench: Bench, name: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = bench.input.with_name(name)
        table.write_text('{"text": "my own words"}')
        line = refused(bench.write(["cake"]), capsys, "--input", str(table))
        assert "is not a CSV: convert it" in line
        assert words in line
        assert "my own words" not in line

    @pytest.mark.parametrize("more", [("--plot", "p" * 255 + ".png"), ("--output", "o" * 250 + ".csv")])
    def test_an_output_whose_name_is_too_long_is_refused(
        self, bench: Bench, more: tuple[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        flag, name = more
        line = refused(
            bench.write(["cake"]), capsys, flag, str(bench.output.with_name(name)), "--store", str(bench.store)
        )
        assert "File name too long" in line

    def test_an_output_whose_name_is_just_short_enough_is_written(self, bench: Bench) -> None:
        bench.output = bench.output.with_name("o" * 240 + ".csv")
        bench.write(["cake"]).enrich(store_filepath=bench.store)
        bench.check()

    def test_an_output_in_a_folder_that_takes_no_file_is_refused(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(bench.write(["cake"]), capsys, "--plot", "/proc/self/plot.png")
        assert "The plot /proc/self/plot.png could not be written (" in line

    def test_a_read_only_output_is_refused(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(["cake"]).enrich()
        bench.output.chmod(0o444)
        assert "out.csv is read-only: " in refused(bench, capsys, "--overwrite")

    @pytest.mark.parametrize("other", ["--gold", "--examples", "--instructions"])
    def test_an_output_that_is_also_read_is_refused(
        self, bench: Bench, other: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.write(["cake"]).input.with_name("used.csv")
        path.write_text(f"text,{','.join(LABELS)}\ncake,1,0,0\n")
        line = refused(bench, capsys, other, str(path), "--output", str(path))
        assert f"The output and the {other[2:]} are the same file" in line
        link = path.with_name("link.csv")
        link.hardlink_to(path)
        refused(bench, capsys, other, str(path), "--output", str(link))

    def test_a_coded_sample_that_is_passed_as_gold_may_grow_however_its_path_is_spelled(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = Path(f"{bench.output}.sample.csv")
        bench.write(make_texts(20)).enrich(sample=5)
        path.write_text(path.read_text(encoding="utf-8-sig").replace(",,,", ",1,0,0"), encoding="utf-8")
        monkeypatch.chdir(path.parent)
        frame = bench.enrich(sample=10, gold=path.name)
        assert frame.attrs["enrichment"]["corrected_shares"][LABELS[0]]["coded"] == 5

    @pytest.mark.parametrize("flag", ["--codebook", "--api-key-file"])
    def test_an_output_that_is_the_codebook_or_the_key_file_is_refused(
        self, bench: Bench, flag: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.write(["cake"]).input.with_name("used.csv")
        path.write_text("label,definition\n" + "".join(f"{label},something\n" for label in LABELS))
        assert "are the same file" in refused(bench, capsys, flag, str(path), "--output", str(path), "--overwrite")

    @pytest.mark.parametrize("kind", ["socket", "folder"])
    @pytest.mark.parametrize(
        "name", ["out.csv", "plot.png", "out.csv.run.json", "out.csv.sample.csv", "out.csv.disagreements.csv"]
    )
    def test_what_is_no_file_is_refused_whatever_is_to_be_written_there(
        self, bench: Bench, name: str, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = bench.write(["cake"]).input.with_name(name)
        monkeypatch.chdir(path.parent)  # a socket's path may not be long
        if kind == "folder":
            path.mkdir()
        else:  # which, unlike a pipe, does not keep a test waiting that opens it, and is nobody else's, as a device is
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(name)
        gold = bench.input.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\ncake,1\n")
        arguments = ["--gold", str(gold), "--plot", str(bench.input.with_name("plot.png")), "--sample", "1"]
        assert bench.command(*arguments, "--overwrite") == 2
        words = "is a folder: add a file name." if kind == "folder" else "is a device or a pipe: choose a file."
        assert words in capsys.readouterr().err
        assert bench.server.calls == []
        assert not bench.store.exists()

    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("plot.png", ["--input", "--gold", "--codebook", "--examples", "--api-key-file", "--store"]),
            ("out.csv.run.json", ["--codebook", "--api-key-file", "--store"]),
            ("out.csv.sample.csv", ["--input", "--codebook", "--examples", "--api-key-file", "--store"]),
        ],
    )
    def test_an_output_path_equal_to_an_input_path_is_refused(
        self, bench: Bench, name: str, flags: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.write(["cake"]).input.with_name(name)
        arguments = ["--plot", str(bench.input.with_name("plot.png")), "--sample", "1", "--overwrite"]
        for flag in flags:
            content = f"text,{','.join(LABELS)}\ncake,1,0,0\n"
            if flag == "--codebook":
                content = "label,definition\n" + "".join(f"{label},something\n" for label in LABELS)
            path.unlink(missing_ok=True)
            if flag != "--store":
                path.write_text("a-key" if flag == "--api-key-file" else content)
            before = path.read_bytes() if path.exists() else b""
            assert bench.command(*arguments, flag, str(path)) == 2
            assert "are the same file" in capsys.readouterr().err
            assert bench.server.calls == []
            assert (path.read_bytes() if path.exists() else b"") == before

    def test_an_output_that_is_changed_while_the_run_is_on_is_kept(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(5)).enrich()
        bench.server.on_call = lambda number, body: bench.output.write_text("mine") and None
        assert bench.write(make_texts(10)).command() == 1
        assert "was changed while this run was on, and would be lost: move it" in capsys.readouterr().err
        assert bench.output.read_text() == "mine"
        bench.output.unlink()
        calls = len(bench.server.calls)
        assert bench.command() == 0
        assert len(bench.server.calls) == calls
        bench.check()


class TestDrafts:
    def test_a_disk_on_which_no_mode_can_be_set_is_no_failure(self, bench: Bench) -> None:
        """Network drives refuse chmod."""

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        bench.write(make_texts(20)).enrich(limit=10)
        with pytest.MonkeyPatch.context() as patch:
            for system, name in ((Path, "chmod"), (os, "chmod"), (os, "chown")):
                patch.setattr(system, name, refuse)
            bench.enrich()
        bench.check()

    def test_the_mode_is_kept(self, bench: Bench) -> None:
        bench.write(make_texts(5)).enrich(limit=2)
        bench.output.chmod(0o600)
        bench.enrich()
        assert stat.S_IMODE(bench.output.stat().st_mode) == 0o600

    @pytest.mark.skipif("os.getuid() != 0")
    def test_the_output_keeps_its_owner(self, bench: Bench) -> None:
        bench.write(make_texts(5)).enrich(limit=2)
        os.chown(bench.output, 1234, 2345)
        bench.enrich()
        assert (bench.output.stat().st_uid, bench.output.stat().st_gid) == (1234, 2345)

    def test_a_link_in_the_place_of_a_temporary_file_leads_no_data_elsewhere(self, bench: Bench) -> None:
        """Laid while the run goes on, by somebody who knows the name of the temporary file."""
        precious = bench.input.with_name("precious")
        precious.write_text("precious")
        bench.write(make_texts(5)).enrich(limit=2)
        draft = module.draft_of(bench.output)
        bench.server.on_call = lambda number, body: draft.symlink_to(precious)
        bench.enrich()
        bench.check()
        assert precious.read_text() == "precious"
        assert not bench.output.is_symlink()

    def test_a_users_own_file_of_a_like_name_is_left_alone(self, bench: Bench) -> None:
        precious = bench.output.with_name("out.csv.tmp")
        precious.write_text("precious")
        bench.write(["cake"]).enrich()
        assert precious.read_text() == "precious"

    def test_what_a_killed_run_left_is_removed_by_the_next(self, bench: Bench) -> None:
        bench.server.model.first_token = 0.2
        bench.write(make_texts(20)).enrich(limit=10)
        drafts = [module.draft_of(path) for path in (bench.output, Path(f"{bench.output}.sample.csv"))]
        for draft in drafts:
            draft.write_text("half")
        bench.enrich(sample=5)
        assert not any(draft.exists() for draft in drafts)
        Path(f"{bench.output}.sample.csv").unlink()
        assert sorted(path.name for path in bench.output.parent.iterdir()) == [
            "in.csv", "out.csv", "out.csv.answers.sqlite3", "out.csv.methods.md", "out.csv.run.json",
            "out.csv.sample.html",
        ]  # fmt: skip


def test_a_failed_write_leaves_the_old_output_whole(tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    output.write_text("old")
    (tmp_path / "in.csv").touch()
    with module.Store(None) as store:
        options = module.Options(tmp_path / "in.csv", output, "text", None, ["x"], overwrite=True)
        files = module.Files(store, options)
        files.check()
        with pytest.raises(RuntimeError), files.replacing("output") as file:
            file.write(b"half of the new")
            raise RuntimeError
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_an_output_that_cannot_be_written_loses_nothing(
    enrich_bytes: Callable[..., bytes], tmp_path: Path, server: StandIn
) -> None:
    output = tmp_path / "out.csv"
    server.on_call = lambda number, body: output.mkdir()
    with pytest.raises(module.EnrichmentError, match=r"cannot be written .*no answers are lost"):
        enrich_bytes(b"text\npraise\n")
    output.rmdir()
    assert enrich_bytes(b"text\npraise\n") == b"text,praise\npraise,1\n"
    assert len(server.calls) == 1


def test_an_output_behind_a_link_is_written_where_the_link_points(
    enrich_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.csv").symlink_to(tmp_path / "elsewhere" / "out.csv")
    enrich_bytes(b"text\npraise\n")
    assert (tmp_path / "out.csv").is_symlink()
    assert (tmp_path / "elsewhere" / "out.csv").read_text() == "text,praise\npraise,1\n"
