"""The files that a run writes: none of the user's is overwritten, each is whole, and keeps its mode."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
from pathlib import Path

import pytest
from conftest import LABELS, Job, make_texts

import enrich_dataset as module


def refused(job: Job, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that sent and changed nothing."""
    before = {path: path.read_bytes() for path in job.input.parent.rglob("*") if path.is_file()}
    calls = len(job.server.calls)
    capsys.readouterr()
    assert job.command(*arguments) == 2
    assert {path: path.read_bytes() for path in job.input.parent.rglob("*") if path.is_file()} == before
    assert len(job.server.calls) == calls
    line = capsys.readouterr().err
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    return line


class TestOverwriting:
    @pytest.mark.parametrize("name", ["out.csv", "out.csv.run.json", "out.csv.disagreements.csv", "plot.png"])
    def test_a_file_that_the_program_did_not_write_is_kept(
        self, job: Job, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job.write(["cake"])
        gold = job.input.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\ncake,1\n")
        (job.input.parent / name).write_text("precious")
        arguments = ["--gold", str(gold), "--plot", str(job.input.with_name("plot.png"))]
        line = refused(job, capsys, *arguments)
        assert f"{name} was not written by a run on this store, and would be lost" in line
        assert "or pass --overwrite." in line
        assert job.command("--overwrite", *arguments) == 0
        assert (job.input.parent / name).read_bytes() != b"precious"

    def test_corrections_by_hand_are_kept_and_become_the_input(
        self, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job.write(["cake", "violence"]).enrich()
        corrected = job.output.read_text().replace("0,0,0", "0,1,0")
        job.output.write_text(corrected)
        line = refused(job, capsys)
        assert "was changed since it was written, and would be lost" in line
        assert "make it the input of a run with another output: existing 0 and 1 cells are kept." in line
        other = job.output.with_name("other.csv")
        module.enrich_dataset(job.output, other, "text", None, LABELS, base_url=job.server.url, quiet=True)
        assert other.read_text() == corrected

    def test_a_dry_run_says_so_too_and_allows_nothing_for_later(
        self, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job.write(["cake"]).enrich()
        job.output.write_text("mine")
        refused(job, capsys, "--dry-run")
        assert job.command("--dry-run", "--overwrite") == 0
        refused(job, capsys)

    def test_a_kill_between_the_note_and_the_move_is_no_change_of_the_users(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for limit in (2, 4, 6):
            with monkeypatch.context() as patch:

                def kill(*_: object) -> None:
                    patch.setattr(Path, "unlink", lambda *_, **__: None)
                    raise KeyboardInterrupt

                patch.setattr(Path, "replace", kill)
                with pytest.raises(KeyboardInterrupt):
                    job.write(make_texts(10)).enrich(limit=limit)
        job.enrich()
        job.check()
        assert not [path for path in job.output.parent.iterdir() if path.suffix == ".tmp"]

    def test_folders_can_be_moved_and_outputs_share_a_store(self, job: Job, tmp_path: Path) -> None:
        job.write(make_texts(5)).enrich()
        module.enrich_dataset(
            job.input, tmp_path / "second.csv", "text", None, LABELS[:1], store_filepath=job.store, quiet=True,
            base_url=job.server.url, model="gpt-4o-mini",
        )  # fmt: skip
        moved = tmp_path / "moved"
        moved.mkdir()
        for path in (job.input, job.output, job.store, Path(f"{job.output}.run.json")):
            path.rename(moved / path.name)
        again = Job(moved, job.server).write([*make_texts(5), "cake"])
        again.enrich()
        again.check()
        assert len(job.asked) == 6


class TestRefused:
    @pytest.mark.parametrize("name", ["out.xlsx", "out.parquet", "out.JSONL"])
    def test_an_output_of_another_kind(self, job: Job, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(job.write(["cake"]), capsys, "--output", str(job.output.with_name(name)))
        assert f"{name} is always CSV: use a name that ends in .csv" in line

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("table.xlsx", "convert it with pandas.read_excel("),
            ("table.jsonl", ".jsonl', lines=True).to_csv("),
            ("table.parquet", "table.csv', index=False)."),
        ],
    )
    def test_an_input_of_another_kind(
        self, job: Job, name: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = job.input.with_name(name)
        table.write_text('{"text": "my own words"}')
        line = refused(job.write(["cake"]), capsys, "--input", str(table))
        assert "is not a CSV: convert it" in line
        assert words in line
        assert "my own words" not in line

    @pytest.mark.parametrize("more", [("--plot", "p" * 255 + ".png"), ("--output", "o" * 250 + ".csv")])
    def test_an_output_whose_name_is_too_long(
        self, job: Job, more: tuple[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        flag, name = more
        line = refused(job.write(["cake"]), capsys, flag, str(job.output.with_name(name)), "--store", str(job.store))
        assert "File name too long" in line

    def test_an_output_whose_name_is_just_short_enough_is_written(self, job: Job) -> None:
        job.output = job.output.with_name("o" * 240 + ".csv")
        job.write(["cake"]).enrich(store_filepath=job.store)
        job.check()

    def test_an_output_in_a_folder_that_takes_no_file(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        line = refused(job.write(["cake"]), capsys, "--plot", "/proc/self/plot.png")
        assert "The plot /proc/self/plot.png could not be written (" in line

    def test_a_read_only_output(self, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
        job.write(["cake"]).enrich()
        job.output.chmod(0o444)
        assert "out.csv is read-only: " in refused(job, capsys, "--overwrite")

    @pytest.mark.parametrize("other", ["--gold", "--examples", "--instructions"])
    def test_a_file_that_is_read_as_something_else(
        self, job: Job, other: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = job.write(["cake"]).input.with_name("used.csv")
        path.write_text(f"text,{','.join(LABELS)}\ncake,1,0,0\n")
        line = refused(job, capsys, other, str(path), "--output", str(path))
        assert f"The output and the {other[2:]} are the same file" in line
        link = path.with_name("link.csv")
        link.hardlink_to(path)
        refused(job, capsys, other, str(path), "--output", str(link))

    def test_but_a_coded_sample_may_grow_however_its_path_is_spelled(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = Path(f"{job.output}.sample.csv")
        job.write(make_texts(20)).enrich(sample=5)
        path.write_text(path.read_text(encoding="utf-8-sig").replace(",,,", ",1,0,0"), encoding="utf-8")
        monkeypatch.chdir(path.parent)
        frame = job.enrich(sample=10, gold=path.name)
        assert frame.attrs["enrichment"]["corrected_shares"][LABELS[0]]["coded"] == 5

    @pytest.mark.parametrize("flag", ["--codebook", "--api-key-file"])
    def test_the_codebook_and_the_key_file(self, job: Job, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
        path = job.write(["cake"]).input.with_name("used.csv")
        path.write_text("label,definition\n" + "".join(f"{label},something\n" for label in LABELS))
        assert "are the same file" in refused(job, capsys, flag, str(path), "--output", str(path), "--overwrite")

    @pytest.mark.parametrize("kind", ["socket", "folder"])
    @pytest.mark.parametrize(
        "name", ["out.csv", "plot.png", "out.csv.run.json", "out.csv.sample.csv", "out.csv.disagreements.csv"]
    )
    def test_what_is_no_file_is_refused_whatever_is_to_be_written_there(
        self, job: Job, name: str, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = job.write(["cake"]).input.with_name(name)
        monkeypatch.chdir(path.parent)  # a socket's path may not be long
        if kind == "folder":
            path.mkdir()
        else:  # which, unlike a pipe, does not keep a test waiting that opens it, and is nobody else's, as a device is
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(name)
        gold = job.input.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\ncake,1\n")
        arguments = ["--gold", str(gold), "--plot", str(job.input.with_name("plot.png")), "--sample", "1"]
        assert job.command(*arguments, "--overwrite") == 2
        words = "is a folder: add a file name." if kind == "folder" else "is a device or a pipe: choose a file."
        assert words in capsys.readouterr().err
        assert job.server.calls == []
        assert not job.store.exists()

    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("plot.png", ["--input", "--gold", "--codebook", "--examples", "--api-key-file", "--store"]),
            ("out.csv.run.json", ["--codebook", "--api-key-file", "--store"]),
            ("out.csv.sample.csv", ["--input", "--codebook", "--examples", "--api-key-file", "--store"]),
        ],
    )
    def test_what_is_read_is_written_over_by_nothing(
        self, job: Job, name: str, flags: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = job.write(["cake"]).input.with_name(name)
        arguments = ["--plot", str(job.input.with_name("plot.png")), "--sample", "1", "--overwrite"]
        for flag in flags:
            content = f"text,{','.join(LABELS)}\ncake,1,0,0\n"
            if flag == "--codebook":
                content = "label,definition\n" + "".join(f"{label},something\n" for label in LABELS)
            path.unlink(missing_ok=True)
            if flag != "--store":
                path.write_text("a-key" if flag == "--api-key-file" else content)
            before = path.read_bytes() if path.exists() else b""
            assert job.command(*arguments, flag, str(path)) == 2
            assert "are the same file" in capsys.readouterr().err
            assert job.server.calls == []
            assert (path.read_bytes() if path.exists() else b"") == before


class TestDrafts:
    def test_a_disk_on_which_no_mode_can_be_set_is_no_failure(self, job: Job) -> None:
        """Network drives refuse chmod."""

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        job.write(make_texts(20)).enrich(limit=10)
        with pytest.MonkeyPatch.context() as patch:
            for system, name in ((Path, "chmod"), (os, "chmod"), (os, "chown")):
                patch.setattr(system, name, refuse)
            job.enrich()
        job.check()

    def test_the_mode_is_kept(self, job: Job) -> None:
        job.write(make_texts(5)).enrich(limit=2)
        job.output.chmod(0o600)
        job.enrich()
        assert stat.S_IMODE(job.output.stat().st_mode) == 0o600

    @pytest.mark.skipif("os.getuid() != 0")
    def test_the_output_keeps_its_owner(self, job: Job) -> None:
        job.write(make_texts(5)).enrich(limit=2)
        os.chown(job.output, 1234, 2345)
        job.enrich()
        assert (job.output.stat().st_uid, job.output.stat().st_gid) == (1234, 2345)

    def test_a_link_in_the_place_of_a_temporary_file_leads_no_data_elsewhere(self, job: Job) -> None:
        """Laid while the run goes on, by somebody who knows the name of the temporary file."""
        precious = job.input.with_name("precious")
        precious.write_text("precious")
        job.write(make_texts(5)).enrich(limit=2)
        draft = module.draft_of(job.output)
        admit = job.server.admit

        def lay(tokens: int) -> tuple[dict[str, str], str]:
            draft.symlink_to(precious)
            return admit(tokens)

        job.server.admit = lay  # type: ignore[method-assign]
        job.enrich()
        job.check()
        assert precious.read_text() == "precious"
        assert not job.output.is_symlink()

    def test_a_users_own_file_of_a_like_name_is_left_alone(self, job: Job) -> None:
        precious = job.output.with_name("out.csv.tmp")
        precious.write_text("precious")
        job.write(["cake"]).enrich()
        assert precious.read_text() == "precious"

    def test_what_a_killed_run_left_is_removed_by_the_next(self, job: Job) -> None:
        job.server.first_token = 0.2
        job.write(make_texts(20)).enrich(limit=10)
        drafts = [module.draft_of(path) for path in (job.output, Path(f"{job.output}.sample.csv"))]
        for draft in drafts:
            draft.write_text("half")
        job.enrich(sample=5)
        assert not any(draft.exists() for draft in drafts)
        Path(f"{job.output}.sample.csv").unlink()
        assert sorted(path.name for path in job.output.parent.iterdir()) == [
            "in.csv", "out.csv", "out.csv.answers.sqlite3", "out.csv.methods.md", "out.csv.run.json",
            "out.csv.sample.html",
        ]  # fmt: skip


def test_the_hash_of_the_record_is_that_of_what_was_read(job: Job) -> None:
    gold = job.input.with_name("gold.csv")
    gold.write_text(f"text,{LABELS[0]}\nviolence,1\n")
    read = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (job.write(["violence", "cake"]).input, gold)
    }
    admit = job.server.admit

    def edit(tokens: int) -> tuple[dict[str, str], str]:
        for path in read:
            path.write_text("something else")
        return admit(tokens)

    job.server.admit = edit  # type: ignore[method-assign]
    job.enrich(gold=gold)
    record = json.loads(Path(f"{job.output}.run.json").read_text())
    assert [record["input_sha256"], record["gold_sha256"]] == list(read.values())
