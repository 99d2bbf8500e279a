"""Files, frames and places as people have them: exports of other programs, odd names, environments."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, ROOT, Bench, make_row, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_server import StandIn

import enrich_dataset as module

IMPORT_IDS = '"{""ImportId"":""QID1""}","{""ImportId"":""QID2_TEXT""}"\n'


class TestQualtrics:
    """An export has two more header lines; its text is in the last column."""

    CONTENT = f'QID1,text\n"How old\nare you?","What do you think of violence, in your own words?"\n{IMPORT_IDS}'

    def test_its_further_header_lines_are_left_blank_not_sent_and_not_counted(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = self.CONTENT + "31,cake\n29,violence\n"
        bench.input.write_text(content)
        assert bench.command("--sample", "9") == 0
        printed = capsys.readouterr().out
        assert "Dataset loaded: 2 rows\n" in printed
        assert "Header lines after the first, as Qualtrics writes them (left blank): 2\n" in printed
        assert "praising_violence: 1/2 (50.0%)\n" in printed
        assert "✓ Sample: 2 of 2 distinct texts" in printed
        assert "blank text" not in printed
        assert bench.asked == ["cake", "violence"]
        lines = bench.output.read_text().splitlines()
        assert lines[0] == f"QID1,text,{','.join(LABELS)}"
        assert lines[2:] == ['are you?","What do you think of violence, in your own words?",,,', f"{IMPORT_IDS.strip()},,,",
                             "31,cake,0,0,0", "29,violence,1,0,0"]  # fmt: skip

    def test_a_frame_of_it_is_treated_alike_and_label_columns_are_no_values_there(self, bench: Bench) -> None:
        frame = pd.DataFrame({"text": ["What?", '{"ImportId":"QID1"}', "violence"], LABELS[0]: ["Is it?", "{}", None]})
        labelled = module.enrich_dataframe(frame, "text", LABELS, base_url=bench.server.url)
        assert bench.asked == ["violence"]
        assert labelled[LABELS[0]].isna().tolist() == [True, True, False]

    def test_one_with_import_ids_alone(self, bench: Bench) -> None:
        bench.input.write_text(f"id,text\n{IMPORT_IDS}1,cake\n")
        bench.enrich()
        assert bench.asked == ["cake"]


CODES = ["NA", "NaN", "<NA>", "NULL", r"\N"]
TEXTS = ["None", "null", "n/a", "nan", "na"]


class TestMissingValues:
    def test_unquoted_codes_are_missing_texts_and_quoted_ones_and_other_words_are_texts(self, bench: Bench) -> None:
        rows = [*CODES, *(f'"{code}"' for code in CODES), *TEXTS]
        bench.input.write_text("id,text\n" + "".join(f"{number},{text}\n" for number, text in enumerate(rows)))
        frame = bench.enrich()
        assert sorted(bench.asked) == sorted([*CODES, *TEXTS])
        assert frame["text"].isna().tolist() == [True] * 5 + [False] * 10
        assert frame["text"].tolist()[5:] == [*CODES, *TEXTS]
        assert frame[LABELS[0]].isna().tolist() == [True] * 5 + [False] * 10
        assert bench.output.read_text().splitlines()[1:7] == [
            *(f"{number},{code},,," for number, code in enumerate(CODES)),
            '5,"NA",0,0,0',
        ]

    @pytest.mark.parametrize("code", [*CODES, *(f'"{code}"' for code in CODES), "na", "nan", " NA "])
    def test_in_label_and_gold_columns_they_are_blanks_quoted_or_not(self, bench: Bench, code: str) -> None:
        bench.input.write_text(f"text,{LABELS[0]}\nviolence,{code}\ntram,0\n")
        gold = bench.output.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\nviolence,1\ntram,{code}\n")
        told = bench.enrich(gold=gold).attrs["enrichment"]
        assert sorted(bench.asked) == ["tram", "violence"]
        assert told["gold"][LABELS[0]]["rows"] == 1

    def test_in_a_frame_what_pandas_calls_missing_is_missing_and_no_word(self, bench: Bench) -> None:
        frame = pd.DataFrame({"text": ["NA", None, float("nan"), pd.NA, "cake"]})
        labelled = module.enrich_dataframe(frame, "text", LABELS, base_url=bench.server.url)
        assert bench.asked == ["NA", "cake"]
        assert labelled[LABELS[0]].isna().tolist() == [False, True, True, True, False]


class TestSurplus:
    def test_a_delimiter_at_the_end_of_each_row_is_read_and_the_first_label_takes_its_field(self, bench: Bench) -> None:
        bench.input.write_text("id,text\n1,cake,\n2,violence,\n")
        frame = bench.enrich()
        assert bench.output.read_text() == f"id,text,{','.join(LABELS)}\n1,cake,0,0,0\n2,violence,1,0,0\n"
        assert pd.read_csv(bench.output)[LABELS[0]].tolist() == [0, 1]
        assert frame["text"].tolist() == ["cake", "violence"]

    def test_row_names_without_a_header_are_told_as_what_they_are(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.input.write_text('"text","label"\n"1","cake","x"\n"2","violence","y"\n')
        assert bench.command() == 2
        errors = capsys.readouterr().err
        assert "So it is with all records: if R wrote row names, write the file without them" in errors
        assert errors.count("\n") == 1

    def test_one_row_that_is_longer_is_told_by_its_line(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.input.write_text("id,text\n1,cake,\n2,violence\n")
        assert bench.command() == 2
        assert "line 2: this record has 3 fields, the header has 2" in capsys.readouterr().err


class TestNames:
    def test_a_home_folder_and_any_path_like_will_do(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        class Place:
            def __init__(self, path: Path) -> None:
                self.path = path

            def __fspath__(self) -> str:
                return str(self.path)

        monkeypatch.setenv("HOME", str(bench.input.parent))
        bench.write(["cake"])
        url: Any = {"base_url": bench.server.url, "quiet": True}
        module.enrich_dataset("~/in.csv", "~/out.csv", "text", None, LABELS, **url)
        assert bench.output.exists()
        module.enrich_dataset(Place(bench.input), Place(bench.output), "text", None, LABELS, **url)  # type: ignore[arg-type]
        assert len(bench.server.calls) == 1

    def test_columns_of_a_frame_may_have_any_names(self, bench: Bench) -> None:
        frame = pd.DataFrame({0: ["cake", "violence"], ("a", 1): ["x", "y"], 2020: [1, 2]})
        labelled = module.enrich_dataframe(
            frame,
            0,
            LABELS,
            context=[("a", 1)],
            by=2020,
            base_url=bench.server.url,  # type: ignore[arg-type, list-item]
        )
        assert list(labelled.columns) == [0, ("a", 1), 2020, *LABELS]
        assert labelled[LABELS[0]].tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("in.csv.gz", "is compressed: unpack it (gunzip -k "),
            ("in.csv.bz2", "is compressed: unpack it (bunzip2 -k "),
            ("in.zip", "is compressed: unpack it (unzip "),
            ("in.csv.xz", "is compressed: unpack it (unxz -k "),
            ("in.xlsm", "convert it with pandas.read_excel("),
            ("in.ods", "convert it with pandas.read_excel("),
            ("in.ndjson", "convert it with pandas.read_json("),
            ("in.dta", "convert it with pandas.read_stata("),
            ("in.sav", "convert it with pandas.read_spss("),
            ("in.feather", "convert it with pandas.read_feather("),
        ],
    )
    def test_a_file_that_is_no_csv_says_how_to_make_one_and_is_none_as_output(
        self, bench: Bench, name: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.input.with_name(name)
        path.write_bytes(b"x")
        arguments = [str(path) if word == str(bench.input) else word for word in bench.arguments()]
        assert module.main(arguments) == 2
        assert words in capsys.readouterr().err
        arguments = [str(path) if word == str(bench.output) else word for word in bench.write(["cake"]).arguments()]
        assert module.main(arguments) == 2
        assert "is always CSV: use a name that ends in .csv" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("/dev/stdin", "is a device or a pipe, which can be read but once: save it first"),
            ("https://example.org/x.csv", "is an address: download the file"),
            ("s3://bucket/x.csv", "is an address: download the file"),
        ],
    )
    def test_what_is_no_file_is_refused_with_the_reason(
        self, bench: Bench, path: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = [path if word == str(bench.input) else word for word in bench.arguments()]
        if path == "/dev/stdin":  # under a test it may be a file
            run = subprocess.run(
                [sys.executable, str(ROOT / "enrich_dataset.py"), *arguments], input="text\ncake\n", text=True,
                capture_output=True,
            )  # fmt: skip
            assert words in run.stderr
            assert run.returncode == 2
        else:
            assert module.main(arguments) == 2
            assert words in capsys.readouterr().err

    def test_bytes_in_a_frame_are_refused_with_the_cure(self) -> None:
        with pytest.raises(module.InputError, match=r"Row 0 of the column 'text' holds bytes: read the file with its"):
            module.enrich_dataframe(pd.DataFrame({"text": [b"caf\xe9"]}), "text", ["a"])

    def test_gold_keys_of_which_none_fits_are_shown_beside_the_tables(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.input.write_text("id,text\n001,cake\n002,tram\n")
        gold = bench.output.with_name("gold.csv")
        gold.write_text(f"id,{LABELS[0]}\n1,1\n2,0\n")
        assert bench.command("--gold", str(gold), "--gold-key", "id") == 2
        assert "they have '1' and the like, it has '001' (spreadsheets drop zeros" in capsys.readouterr().err
        assert not bench.server.calls


VALUES = {
    "texts": st.one_of(st.none(), st.text(max_size=6)),
    "numbers": st.integers(-9, 9),
    "floats": st.floats(allow_nan=True, width=16),
    "dates": st.datetimes(pd.Timestamp("2000-01-01").to_pydatetime(), pd.Timestamp("2030-01-01").to_pydatetime()),
    "truths": st.booleans(),
}
KINDS = {"texts": [object, "string", "category"], "numbers": ["int8", "Int64", object], "floats": ["float32", "Float64"],
         "dates": ["datetime64[ns]"], "truths": [bool, "boolean"]}  # fmt: skip


@st.composite
def frames(draw: st.DrawFn) -> tuple[pd.DataFrame, Any]:
    """A frame of odd types, index and names, and the column of its texts."""
    rows = draw(st.integers(0, 5))
    names = draw(st.lists(st.one_of(st.text(max_size=3), st.integers(0, 9), st.tuples(st.text(max_size=2), st.integers(0, 3))),
                          min_size=1, max_size=4, unique_by=str))  # fmt: skip
    columns = {}
    for name in names:
        kind = draw(st.sampled_from(sorted(VALUES)))
        values = draw(st.lists(VALUES[kind], min_size=rows, max_size=rows))
        columns[name] = pd.Series(values, dtype=draw(st.sampled_from(KINDS[kind])))
    frame = pd.DataFrame(columns)
    frame.columns = pd.Index(names, tupleize_cols=False)
    index = draw(st.sampled_from(["range", "texts", "doubled", "dates"]))
    frame.index = {
        "range": pd.RangeIndex(rows), "texts": pd.Index(list("vwxyz")[:rows], name="text"),
        "doubled": pd.Index([1] * rows), "dates": pd.date_range("2020", periods=rows),
    }[index]  # fmt: skip
    return frame, draw(st.sampled_from(names))


@settings(max_examples=60, deadline=None)
@given(frames())
def test_any_frame_comes_back_as_it_was_with_columns_added(given_frame: tuple[pd.DataFrame, Any]) -> None:
    frame, name = given_frame
    before = frame.copy(deep=True)
    with StandIn() as server:
        labelled = module.enrich_dataframe(frame, name, ["a label"], base_url=server.url)
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(labelled.iloc[:, :-1], before, check_column_type=False)
    assert list(labelled.columns) == [*before.columns, "a label"]
    is_blank = before[name].isna() | (before[name].astype(str).str.strip() == "")
    assert labelled["a label"].isna().tolist() == is_blank.tolist()


class TestEnvironment:
    def run(
        self, bench: Bench, *more: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "enrich_dataset.py"), *bench.arguments(*more)]
        return subprocess.run(
            command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
        )

    def test_a_backend_of_a_notebook_works_or_is_named(self, bench: Bench) -> None:
        plot = bench.output.with_suffix(".png")
        bench.write(["cake"])
        for backend in ("module://matplotlib_inline.backend_inline", "no such backend"):
            run = self.run(bench, "--plot", str(plot), "--base-url", bench.server.url, MPLBACKEND=backend)
            assert run.returncode == 0 or f"matplotlib does not know MPLBACKEND '{backend}': unset it." in run.stderr
            assert "unexpected" not in run.stderr

    def test_a_working_directory_that_is_gone_is_no_matter(self, bench: Bench, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        bench.write(["cake"])
        command = [sys.executable, str(ROOT / "enrich_dataset.py"), *bench.arguments("--base-url", bench.server.url)]
        code = f"import os, subprocess, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
        code += f"sys.exit(subprocess.call({command!r}))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert bench.output.exists()

    @pytest.mark.parametrize("has_date", [True, False])
    def test_a_date_to_retry_after_is_read_by_the_servers_clock_or_else_by_ours(
        self, bench: Bench, has_date: bool
    ) -> None:
        server_time = datetime.now(UTC) - timedelta(hours=3) * has_date
        headers = {"retry-after": format_datetime(server_time + timedelta(seconds=30), usegmt=True)}
        headers["date"] = format_datetime(server_time, usegmt=True) if has_date else ""
        bench.server.script.append((429, headers, {}))
        options = module.frame_options(pd.DataFrame(), "text", LABELS, base_url=bench.server.url)
        server = module.Server(options, module.Timing())
        prompt, row = prompt_of(), make_row("cake")
        with server.connect():
            reply = server.chat(module.build_body(module.Attempt((row,), prompt), server.default_parameters))
        assert module.requested_wait(reply) == pytest.approx(30, abs=1.5)

    @pytest.mark.parametrize(("first", "seconds"), [("0", 2.0), ("1500", 1.5)])
    def test_milliseconds_count_unless_there_are_none(self, first: str, seconds: float) -> None:
        reply = module.Reply(429, {"retry-after-ms": first, "retry-after": "2"}, {}, 0.0)
        assert module.requested_wait(reply) == seconds
