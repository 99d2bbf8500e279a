"""Table: every byte of the file is kept, fields are appended, and what is no table is refused in one line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, Bench, parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in_server import StandIn

import enrich_dataset as module


def test_a_column_twice_in_the_header_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.input.write_text("thread,text,thread\na,cake,b\n")
    assert bench.command("--context", "thread") == 2
    assert "The column 'thread' appears more than once" in capsys.readouterr().err


class TestOddHeaders:
    def test_excels_first_line_names_the_delimiter_and_is_kept(self, bench: Bench) -> None:
        for mark in ("", "\ufeff"):
            bench.input.write_text(f"{mark}sep=;\r\ntext;a,b\r\ncake, and more;1\r\n", encoding="utf-8", newline="")
            frame = bench.enrich(overwrite=True)
            expected = f"{mark}sep=;\r\ntext;a,b;{';'.join(LABELS)}\r\ncake, and more;1;0;0;0\r\n"
            assert bench.output.read_bytes().decode() == expected
            assert list(frame.columns) == ["text", "a,b", *LABELS]

    @pytest.mark.parametrize("content", ['text,"note;"\nhello,1\n', 'text,"a|"\nhello,1\n', "sep=,text\r\nx,hello\r\n"])
    def test_a_header_that_looks_odd_by_another_delimiter_is_read(self, bench: Bench, content: str) -> None:
        bench.input.write_text(content, newline="")
        assert len(bench.enrich()) == 1

    @pytest.mark.parametrize("content", ["text;id\na;1\nb\n", 'text;id\na;1\n"b;1"2"\n'])
    def test_lines_are_counted_from_excels_first_one(self, bench: Bench, content: str) -> None:
        bench.input.write_text(f"sep=;\n{content}", encoding="utf-8", newline="")
        with pytest.raises(module.InputError, match="line 4"):
            bench.enrich()

    @pytest.mark.parametrize("encoding", ["utf-32", "utf-32-le", "utf-32-be"])
    def test_utf_32_is_refused(self, bench: Bench, encoding: str) -> None:
        bench.input.write_bytes("\ufefftext\ncake\n".encode(encoding))
        with pytest.raises(module.InputError, match="is UTF-32: save it as UTF-8 CSV"):
            bench.enrich()
        assert bench.server.calls == []

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
    def test_a_doubled_byte_order_mark_is_read(self, bench: Bench, encoding: str) -> None:
        content = "\ufeff\ufefftext,id\ncake,1\n"
        bench.input.write_bytes(content.encode(encoding))
        bench.enrich(["a label"])
        assert bench.output.read_bytes().decode(encoding) == content.replace("id\n", "id,a label\n").replace(
            "1\n", "1,0\n"
        )


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

    def test_an_export_with_import_ids_alone_is_read(self, bench: Bench) -> None:
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


class TestOtherSources:
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

    def test_bytes_in_a_frame_are_refused_with_the_cure(self) -> None:
        with pytest.raises(module.InputError, match=r"Row 0 of the column 'text' holds bytes: read the file with its"):
            module.enrich_dataframe(pd.DataFrame({"text": [b"caf\xe9"]}), "text", ["a"])


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


EXACT = {
    "plain": (b"id,text\n1,praise\n2,cake\n", b"id,text,praise\n1,praise,1\n2,cake,0\n"),
    "no-last-line-end": (b"id,text\n1,praise\n2,cake", b"id,text,praise\n1,praise,1\n2,cake,0"),
    "crlf": (b"id,text\r\n1,praise\r\n", b"id,text,praise\r\n1,praise,1\r\n"),
    "cr": (b"id,text\r1,praise\r", b"id,text,praise\r1,praise,1\r"),
    "mixed-ends": (b"id,text\r\n1,praise\n2,cake\r3,tram\r\n", b"id,text,praise\r\n1,praise,1\n2,cake,0\r3,tram,0\r\n"),
    "doubled-cr": (b"id,text\r\r\n1,praise\r\r\n", b"id,text,praise\r\r\n1,praise,1\r\r\n"),
    "semicolons": (b"id;text\n1;praise, no\n", b"id;text;praise\n1;praise, no;1\n"),
    "tabs": (b"id\ttext\n1\tpraise\n", b"id\ttext\tpraise\n1\tpraise\t1\n"),
    "bars": (b"id|text\n1|praise\n", b"id|text|praise\n1|praise|1\n"),
    "one-column": (b"text\npraise\n", b"text,praise\npraise,1\n"),
    "bom": (b"\xef\xbb\xbftext,id\npraise,1\n", b"\xef\xbb\xbftext,id,praise\npraise,1,1\n"),
    "bom-and-quotes": (b'\xef\xbb\xbf"text","id"\n"praise","1"\n', b'\xef\xbb\xbf"text","id","praise"\n"praise","1","1"\n'),
    "utf-16-le": ("\ufefftext,id\npraisé,1\n".encode("utf-16-le"), "\ufefftext,id,praise\npraisé,1,1\n".encode("utf-16-le")),
    "utf-16-be": ("\ufefftext\tid\npraise\t1\n".encode("utf-16-be"), "\ufefftext\tid\tpraise\npraise\t1\t1\n".encode("utf-16-be")),
    "cp1252": (b"id,text\n\x80,praise\n", b"id,text,praise\n\x80,praise,1\n"),
    "all-quoted": (b'"id","text"\n"1","praise"\n"2",""\n', b'"id","text","praise"\n"1","praise","1"\n"2","",""\n'),
    "header-quoted": (b'"id","text"\n1,"praise"\n', b'"id","text","praise"\n1,"praise",1\n'),
    "records-quoted": (b'id,text\n"1","praise"\n', b'id,text,praise\n"1","praise","1"\n'),
    "newlines-inside": (b'text,id\n"praise\nand\r\nmore\rof it",1\n', b'text,id,praise\n"praise\nand\r\nmore\rof it",1,1\n'),
    "ends-in-a-quoted-newline": (b'id,text\n1,"praise\n"\n', b'id,text,praise\n1,"praise\n",1\n'),
    "blank-lines": (b"\n\nid,text\n\n1,praise\n\n \n2,cake\n\n", b"\n\nid,text,praise\n\n1,praise,1\n\n \n2,cake,0\n\n"),
    "odd-quotes": (b'id,text\n "1",praise "x"\n"a"b"c,praise\n', b'id,text,praise\n "1",praise "x",1\n"a"b"c,praise,1\n'),
    "numbers-as-they-were": (b"id,text\n00123,praise\n1.10,NA\n1e5,null\n", b"id,text,praise\n00123,praise,1\n1.10,NA,\n1e5,null,0\n"),
    "control-characters": (b"id,text\n\x18\x1c\x1d,praise\x85\n", None),
    "blank-header": (b",text,\n1,praise,2\n", b",text,,praise\n1,praise,2,1\n"),
    "newline-in-header": (b'"a\n\x0b",text\n1,praise\n', b'"a\n\x0b",text,praise\n1,praise,1\n'),
    "doubled-other-column": (b"id,id,text\n1,2,praise\n", b"id,id,text,praise\n1,2,praise,1\n"),
    "separators-of-lines": ("id,text\n\u2028,praise\u2029\n".encode(), "id,text,praise\n\u2028,praise\u2029,1\n".encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_every_byte_is_kept(name: str, enrich_bytes: Callable[..., bytes]) -> None:
    content, right = EXACT[name]
    written = enrich_bytes(content)
    assert written == (right or b"id,text,praise\n\x18\x1c\x1d,praise\x85,1\n")


def test_a_field_may_be_longer_than_csv_allows(enrich_bytes: Callable[..., bytes]) -> None:
    long = b"praise " * 30_000
    assert enrich_bytes(b"text\n" + long + b"\n") == b"text,praise\n" + long + b",1\n"


def test_csvs_own_limit_on_fields_stays_raised_for_others_that_read_meanwhile(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "in.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    csv.field_size_limit(131_072)
    lines = module.read_records(path.open(), ",", "in.csv")
    next(lines)
    lines.close()
    assert csv.field_size_limit() > 131_072


def test_a_label_is_quoted_where_it_must_be(enrich_bytes: Callable[..., bytes]) -> None:
    assert enrich_bytes(b"text\npraise\n", labels=['praise, or "not"']).startswith(b'text,"praise, or ""not"""\n')


REFUSED = {
    "too-long": (b"id,text\n1,2\n1,2,3\n", "line 3: this record has 3 fields, the header has 2"),
    "too-short": (b"id,text\n1\n", "line 2: this record has 1 fields"),
    "one-longer-row": (b"id,text\n1,2,\n1,2\n", "line 2: this record has 3 fields"),
    "torn-by-cr": (b"id,text\n1,a\rb\n", "line 3: this record has 1 fields"),
    "unclosed-quote": (b'id,text\n1,a\n2,"b\n3,c\n', "line 3: a quote in this record is never closed"),
    "no-such-column": (b"id,body\n1,2\n", "is not in the header of .*which has 'id', 'body'"),
    "doubled-column": (b"text,text\n1,2\n", "appears more than once in the header"),
    "empty": (b"", "is empty"),
    "one-newline": (b"\n", "is empty"),
    "bom-alone": (b"\xef\xbb\xbf", "is empty"),
    "binary": (b"PK\x03\x04\x00\x00\xff\xfe\x00text", "is it a binary file"),
    "no-encoding": (b"text\n\x81\x8d\n", "is not text in UTF-8"),
    "utf-16-cut": (b"\xff\xfet\0e\0x\0t\0\n\0a", "this is not text in utf-16-le"),
    "not-a-label-column": (
        b"text,praise\na,1\nb,maybe\n",
        r"row 1 \(line 3\): the column 'praise' holds 'maybe', not 1, 0",
    ),
    "doubled-label-column": (b"text,praise,praise\na,1,1\n", "'praise' appears more than once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_rectangular_table_is_refused_with_its_line(
    name: str, enrich_bytes: Callable[..., bytes], tmp_path: Path, server: StandIn
) -> None:
    content, message = REFUSED[name]
    with pytest.raises(module.InputError, match=message) as caught:
        enrich_bytes(content)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
    assert server.calls == []


def test_a_label_that_the_encoding_lacks_is_refused(enrich_bytes: Callable[..., bytes]) -> None:
    with pytest.raises(module.InputError, match="cp1252"):
        enrich_bytes(b"text\n\x80\n", labels=["賞賛"])


def test_no_text_is_in_a_refusal(enrich_bytes: Callable[..., bytes]) -> None:
    with pytest.raises(module.InputError) as caught:
        enrich_bytes(b"text,praise\nmy secret,my secret\n")
    assert "secret" not in str(caught.value)


WESTERN = {
    "fr": "Il était une fois, à l’école, une élève créée pour être fâchée ; ça n’a duré qu’un été. « Noël » à 20 €",
    "FR": "L'ÉTÉ À L'ÉCOLE ÉTAIT CRÉÉ POUR ÊTRE FÂCHÉ",
    "de": "Größere Füße für süße Mädchen, Äpfel und Öl. Straße, übel – „so“ sagte er, 25 °C",
    "es": "¿Cómo estás, señor? ¡Qué año! El niño está aquí mañana, corazón. ¡¡Olé!! güey",
    "pt": "Não há coração nem ação, avó e avô são irmãos; AÇÃO E NAÇÃO, três às seis",
    "fi": "Määrä ja hääyöaie, pöytää, kylläpä sää on tänään hyvä, ääääh, öö",
    "is": "Það er þó ágætt að búa á Íslandi, hvað ætlarðu að gera?",
    "en": "He said “hello” – it’s fine… 20 € © 2020 ® naïve, ½ of it™",
}


OTHERS = {
    "gbk": "今天天气很好，我去公园",
    "big5": "今天天氣很好",
    "euc_kr": "오늘 날씨가 좋다",
    "shift_jis": "今日は天気がいい",
    "cp1250": "śnieg i łódź, jaźń",
    "cp1251": "и я так думаю",
    "koi8_r": "и я так думаю",
    "cp1255": "שלום עולם",
    "cp1256": "مرحبا كيف حالك",
    "iso8859_7": "Γεια σου κόσμε",
    "mac_roman": "café, résumé, el niño está aquí",
}


@pytest.mark.parametrize("text", WESTERN.values(), ids=WESTERN)
def test_what_is_not_utf8_but_plausible_in_cp1252_is_read_as_that(
    enrich_bytes: Callable[..., bytes], text: str
) -> None:
    content = f"text\n{text.replace(',', '')}\n".encode("cp1252")
    assert enrich_bytes(content) == content.replace(b"text\n", b"text,praise\n")[:-1] + b",0\n"


@pytest.mark.parametrize(("encoding", "text"), OTHERS.items(), ids=OTHERS)
def test_what_is_implausible_in_cp1252_is_refused_until_its_encoding_is_named(
    enrich_bytes: Callable[..., bytes], encoding: str, text: str
) -> None:
    content = f"text\n{text.replace(',', '')}\n".encode(encoding)
    with pytest.raises(module.InputError, match=r"(as cp1252 its words make no sense|is not text in UTF-8).* encoding"):
        enrich_bytes(content)
    assert enrich_bytes(content, encoding=encoding) == content.replace(b"text\n", b"text,praise\n")[:-1] + b",0\n"


@pytest.mark.parametrize("bad", [b"caf\xe9", b"a \xff", b"\xe4"])
def test_one_byte_that_is_not_utf8_is_refused_with_its_line(enrich_bytes: Callable[..., bytes], bad: bytes) -> None:
    content = "text\ncafé\nà bientôt\n".encode() + bad + b"\n"
    with pytest.raises(module.InputError, match=r"in\.csv, line 4: a byte that is not UTF-8, as the rest"):
        enrich_bytes(content)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("klingon", "encoding must be one that Python knows, such as cp1251"),
        ("base64", "encoding must be one that Python knows"),
        ("ascii", r"line 3: this is not text in ascii \(ordinal not in range\(128\)\): pass another encoding"),
        ("utf-7", "line 3: this record could not be written back byte for byte in utf-7"),
    ],
)
def test_an_encoding_that_cannot_serve_is_refused(
    enrich_bytes: Callable[..., bytes], encoding: str, words: str
) -> None:
    content = "text\na\n\u00e9\n".encode() if encoding != "utf-7" else b"text\na\n+AGE-\n"
    with pytest.raises(module.InputError, match=words):
        enrich_bytes(content, encoding=encoding)


def test_the_encoding_that_is_named_is_in_the_record(enrich_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    enrich_bytes("text\nпривет\n".encode("cp1251"), encoding="cp1251")
    assert json.loads((tmp_path / "out.csv.run.json").read_text())["parameters"]["encoding"] == "cp1251"
    with pytest.raises(module.InputError, match="encoding is for a file"):
        module.enrich_dataframe(pd.DataFrame({"text": []}), "text", ["praise"], encoding="cp1251")


MERGED = {
    "a quote escaped by a backslash": b'id,text\n1,"5\\""\n2,"b"\n',
    "a text that begins with a quote": b'id\ttext\n1\t"hello\n2\tx\n3\t"foo" bar\n4\tz\n',
    "stray quotes rows apart": b'id,text\n1,"abc\n2,x\n3,de"f\n',
    "the second of two fields": b'id,text\n"1\n2",x\n3,"abc\r4,de"f\n',
}


@pytest.mark.parametrize("content", MERGED.values(), ids=MERGED)
def test_quotes_that_merge_rows_are_refused_with_both_cures(enrich_bytes: Callable[..., bytes], content: bytes) -> None:
    line = 4 if b'de"f' in content and b"\r" in content else 2
    with pytest.raises(
        module.InputError, match=rf"line {line}: a field that begins with a quote .*double the .*quote the"
    ):
        enrich_bytes(content)


def test_stray_quotes_within_a_line_are_read_as_ever(enrich_bytes: Callable[..., bytes]) -> None:
    content = b'id,text\n1,a "b" c\n"2"x,"b"c\n"3"y,"two\nlines"\n4,5" tall\n'
    assert enrich_bytes(content).count(b",0\n") == 4


@given(body=st.text(st.sampled_from('ab1"",\r\n '), max_size=30))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_that_pandas_and_strict_csv_read_alike_is_refused_for_its_quotes(tmp_path: Path, body: str) -> None:
    content = f"text,b\n{body}"
    try:
        rows = list(csv.reader(io.StringIO(content, newline=""), strict=True))
        frame = pd.read_csv(io.StringIO(content, newline=""), dtype=str, keep_default_na=False)
    except (csv.Error, ValueError):
        return
    path = tmp_path / "in.csv"
    path.write_bytes(content.encode())
    if frame.to_numpy().tolist() == [row for row in rows[1:] if row]:
        try:
            module.read_table(path, module.Columns("text", (), []))
        except module.InputError as error:
            assert "quote" not in str(error)


cell_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    rows=st.lists(st.lists(cell_texts, min_size=3, max_size=3), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quote_all=st.booleans(),
    last_end=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_csv_comes_back_byte_for_byte_plus_columns(
    rows: list[list[str]], delimiter: str, encoding: str, end: str, quote_all: bool, last_end: bool,
    enrich_bytes: Callable[..., bytes],
) -> None:  # fmt: skip
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    if not quote_all:
        special = set(delimiter + '"\r\n')
        quoted = [
            [text if set(cell) & special or not cell.strip() else cell for cell, text in zip(row, line, strict=True)]
            for row, line in zip(rows, quoted, strict=True)
        ]
    header = ['"a"', '"text"', '"c"'] if quote_all else ["a", "text", "c"]
    lines = [delimiter.join(row) for row in [header, *quoted]]
    content = end.join(lines) + (end if last_end else "")

    written = enrich_bytes(content.encode(encoding), labels=["praise", "cakes"]).decode(encoding)

    cells = [row[3:] for row in parse(written, delimiter)[1:]]
    assert [row == ["", ""] for row in cells] == [
        not row[1].strip() or line[1] in module.MISSING_CODES for row, line in zip(rows, quoted, strict=True)
    ]
    quotes_cells = all(cell.startswith('"') for cell in quoted[0])
    values = [[f'"{value}"' if quotes_cells else value for value in row] for row in cells]
    names = ['"praise"', '"cakes"'] if quote_all else ["praise", "cakes"]
    longer = [delimiter.join([line, *added]) for line, added in zip(lines, [names, *values], strict=True)]
    assert written == end.join(longer) + (end if last_end else "")


csv_like = st.text(st.sampled_from('ab01"",;\t|\r\n \ufeff\0é\u2028👊'), max_size=40)


def texts_of(table: module.Table) -> list[str]:
    return [row.text for row in table.rows()]


def gaps_of(table: module.Table) -> list[bytes]:
    """What is between the records: blank lines."""
    return [
        table.content[end:start]
        for end, start in zip([table.header_end, *table.ends], [*table.starts, None], strict=True)
    ]


def without_added(longer: module.Table, table: module.Table) -> bytes:
    """A written file without what its records have more than the table's, which must be at their ends."""
    ends = [table.header_end, *table.ends]
    kept = []
    for number, (start, end) in enumerate(zip([0, *longer.starts], [longer.header_end, *longer.ends], strict=True)):
        old = table.content[([0, *table.starts][number]) : ends[number]].decode(table.encoding)
        new = longer.content[start:end].decode(longer.encoding)
        body = old.rstrip("\r\n")
        assert new.startswith(body)
        assert new.endswith(old[len(body) :])
        kept.append(old.encode(table.encoding))
    return b"".join(part + gap for part, gap in zip(kept, gaps_of(longer), strict=True))


@given(
    head=st.sampled_from(["text,c", "text;b", '"text"\t"c"', "\ufefftext", "text,b,x", "\n\ntext|c"]),
    body=csv_like.map(str.encode) | st.binary(max_size=40),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_in_one_line_or_kept_with_fields_added(
    head: str, body: bytes, end: str, tmp_path: Path
) -> None:
    content = f"{head}{end}".encode() + body
    path, output = tmp_path / "any.csv", tmp_path / "any_out.csv"
    path.write_bytes(content)
    try:
        table = module.read_table(path, module.Columns("text", (), ["x", "b"]))
    except module.InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    cells = module.merge(module.blank_cells(len(table), 2), table.given)
    cells[cells[:, 0] == module.BLANK, 0] = 1
    with output.open("wb") as file:
        table.write(cells, ["x", "b"], file)
    again = module.read_table(output, module.Columns("text", (), ["x", "b"]))
    assert texts_of(again) == texts_of(table)
    assert again.given.tolist() == cells.tolist()
    assert gaps_of(again) == gaps_of(table)
    added = sum(column is None for column in table.label_indexes)
    if added == 2:
        assert without_added(again, table) == content
