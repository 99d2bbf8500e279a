"""The story: a run from its options to its file, with everything known that was ever answered."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import signal
import sqlite3
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow
import pytest
from conftest import LABELS, Bench, code_sample, expected, make_texts, run_figures, sample_of
from stand_in_server import StandIn

import enrich_dataset as module
from enrich_dataset import BudgetExceeded, InputError, ProviderError, enrich_dataframe, enrich_dataset


def enrich_frame(df: pd.DataFrame, server: StandIn, **options: Any) -> pd.DataFrame:
    return enrich_dataframe(df, "text", LABELS, base_url=server.url, **options)


def frame_cells(frame: pd.DataFrame) -> list[list[str]]:
    return [["" if value is pd.NA else str(value) for value in row] for row in frame[LABELS].to_numpy().tolist()]


def test_the_copy_has_label_columns_and_else_nothing_new(server: StandIn) -> None:
    texts = make_texts(30)
    df = pd.DataFrame({"when": pd.date_range("2026-01-01", periods=30), "text": texts}, index=range(100, 130))
    before = df.copy()
    frame = enrich_frame(df, server)
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_frame_equal(frame.drop(columns=LABELS), before)
    assert frame_cells(frame) == expected(texts)
    assert {str(dtype) for dtype in frame.dtypes[LABELS]} == {"Int8"}
    assert frame.attrs["enrichment"]["calls"] == 3


def test_what_is_no_pandas_frame_is_refused_with_what_to_call(server: StandIn) -> None:
    df = pd.DataFrame({"text": ["cake"]})
    others = [
        ("in.csv", r"str: label a CSV with enrich_dataset\("),
        (Path("in.csv"), r"PosixPath: label a CSV with enrich_dataset\("),
        (dd.from_pandas(df), r"DataFrame: call \.map_partitions\(enrich_dataframe"),
        (pyarrow.table(df), r"Table: call \.to_pandas\(\)"),
        (df["text"], r"Series: convert it with pandas\.DataFrame\("),
        (["cake"], r"list: convert it with pandas\.DataFrame\("),
    ]
    for other, words in others:
        with pytest.raises(InputError, match=f"takes a pandas DataFrame as `df`, not a {words}"):
            enrich_frame(other, server)
    for name in ("gold", "examples"):
        with pytest.raises(InputError, match=rf"{name} must be a path or a pandas DataFrame: call \.to_pandas\(\)"):
            enrich_frame(df, server, **{name: pyarrow.table(df)})
    assert server.calls == []


def test_a_frame_that_cannot_be_given_back_fails_before_the_first_call(tmp_path: Path, server: StandIn) -> None:
    class Sealed(pd.DataFrame):
        """A frame that takes no new column, as those of other libraries that build on pandas."""

        def __setitem__(self, key: object, value: object) -> None:
            raise TypeError("sealed")

        @property
        def _constructor(self) -> Any:
            return Sealed

    with pytest.raises(TypeError, match="sealed"):
        enrich_frame(Sealed({"text": ["cake"]}), server)
    path = tmp_path / "in.csv"
    path.write_text("text\n" + "cake\n" * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd, "read_csv", lambda *_, **__: 1 / 0)  # a fault of pandas (23694, below its version 3.1)
        with pytest.raises(InputError, match=r"cannot read .*in\.csv as a DataFrame \(ZeroDivisionError\)"):
            enrich_dataset(path, tmp_path / "out.csv", "text", None, LABELS, base_url=server.url)
    assert server.calls == []


def test_missing_texts_stay_blank(server: StandIn) -> None:
    df = pd.DataFrame({"text": ["violence", None, np.nan, " ", 7]})
    assert frame_cells(enrich_frame(df, server)) == [*expected(["violence"]), *[[""] * 3] * 3, *expected(["7"])]


def test_an_existing_label_is_sent_and_known_cells_are_kept(server: StandIn) -> None:
    df = pd.DataFrame(
        {"text": ["violence", "cake"], "label": ["hate", None], LABELS[0]: [0.0, np.nan], LABELS[1]: [True, None]}
    )
    frame = enrich_frame(df, server, label_column="label")
    assert frame_cells(frame) == [["0", "1", "0"], ["0", "0", "0"]]
    calls = {call.labels: call.body["messages"][1]["content"] for call in server.calls}
    assert calls[LABELS[2],] == '{"660":["violence","hate"]}'
    assert calls[tuple(LABELS)] == '{"660":["cake",""]}'


def test_nothing_is_printed_unless_asked(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    enrich_frame(pd.DataFrame({"text": ["cake"]}), server)
    assert capsys.readouterr() == ("", "")
    enrich_frame(pd.DataFrame({"text": ["cake"]}), server, quiet=False)
    printed = capsys.readouterr().out
    assert printed.startswith("Text column: 'text'\n")
    assert "saved to" not in printed


def test_answers_live_in_a_store_only_if_there_is_one(server: StandIn, tmp_path: Path) -> None:
    df = pd.DataFrame({"text": ["cake"]})
    for store, calls in ((None, 2), (tmp_path / "answers.sqlite3", 1)):
        server.calls.clear()
        for _ in range(2):
            enrich_frame(df, server, store_filepath=store)
        assert len(server.calls) == calls


def test_a_run_without_a_store_that_ends_early_says_how_to_keep_its_answers(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    server.gate.key = "another"
    with pytest.raises(ProviderError):
        enrich_frame(pd.DataFrame({"text": ["cake"]}), server, quiet=False)
    assert (
        "Stopped: 0 of 1 rows were labelled. Only this exception's `frame` has them: pass store_filepath to keep answers."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_ends_early_hands_over_what_was_labelled(server: StandIn, tmp_path: Path, kept: bool) -> None:
    texts = make_texts(200)
    options: dict[str, Any] = {"store_filepath": tmp_path / "answers"} if kept else {}
    with pytest.raises(BudgetExceeded) as capped:
        enrich_frame(pd.DataFrame({"text": texts}), server, max_cost=0.002, **options)
    assert capped.value.frame is not None
    labelled = int(capped.value.frame[LABELS[0]].notna().sum())
    assert 0 < labelled == sum(len(call.texts) for call in server.calls) < 200
    assert frame_cells(capped.value.frame)[:labelled] == expected(texts)[:labelled]
    assert ("Only this exception's `frame` has them: pass store_filepath" in str(capped.value)) is not kept


def test_an_interrupt_hands_over_what_was_labelled_and_has_a_text(server: StandIn) -> None:
    server.on_call = lambda number, body: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None
    with pytest.raises(KeyboardInterrupt, match=r"Stopped: \d+ of 100 rows were labelled") as stopped:
        enrich_frame(pd.DataFrame({"text": make_texts(100)}), server, max_workers=1)
    assert 10 <= stopped.value.frame[LABELS[0]].notna().sum() < 100  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("df", "words"),
    [
        (
            pd.DataFrame({"body": ["a"]}),
            "The text column 'text' is not in the header of the DataFrame, which has 'body'",
        ),
        (
            pd.DataFrame([["a", "b"]], columns=["text", "text"]),
            "'text' appears more than once in the header of the DataFrame",
        ),
        (
            pd.DataFrame({"text": ["a"], LABELS[0]: [2]}),
            r"the DataFrame, row 0: the column 'praising_violence' holds",
        ),
    ],
)
def test_a_frame_that_cannot_be_used_is_refused(df: pd.DataFrame, words: str, server: StandIn) -> None:
    with pytest.raises(InputError, match=words):
        enrich_frame(df, server)


def test_an_unknown_option_is_refused(server: StandIn) -> None:
    with pytest.raises(TypeError, match=r"^enrich_dataframe\(\) got an unexpected keyword argument 'batchsize'$"):
        enrich_frame(pd.DataFrame({"text": ["cake"]}), server, batchsize=3)


def test_a_table_of_the_other_kind_is_refused_by_name(server: StandIn, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input_filepath must be a path: label a DataFrame with enrich_dataframe"):
        df = pd.DataFrame({"text": ["cake"]})
        enrich_dataset(df, tmp_path / "out.csv", "text", None, LABELS, base_url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_the_signature_shows_every_option_with_its_default_and_the_docstring_explains_it() -> None:
    shown, options = (inspect.signature(function).parameters for function in (enrich_dataframe, enrich_dataset))
    assert list(shown)[:5] == ["df", "text_column", "new_labels", "label_column", "quiet"]
    assert set(options) - set(shown) == {"input_filepath", "output_filepath"}
    for name in set(shown) & set(options) - {"label_column", "quiet"}:
        assert shown[name].default == options[name].default
    for function, parameters in ((enrich_dataframe, shown), (enrich_dataset, options)):
        assert function.__doc__
        assert all(f"\n    {name}: " in function.__doc__ for name in parameters)


def test_an_empty_frame_makes_no_call_and_needs_no_key() -> None:
    frame = enrich_dataframe(pd.DataFrame({"text": pd.Series([], dtype=str)}), "text", LABELS)
    assert list(frame.columns) == ["text", *LABELS]
    assert {str(dtype) for dtype in frame.dtypes[LABELS]} == {"Int8"}


def test_on_dask_each_partition_has_its_own_store_and_a_killed_one_pays_only_for_itself(
    server: StandIn, tmp_path: Path
) -> None:
    import dask.dataframe
    from dask.distributed import Client, LocalCluster

    texts = make_texts(80)
    ddf = dask.dataframe.from_pandas(pd.DataFrame({"text": texts}), npartitions=4)
    trap = tmp_path / "trap"
    trap.touch()

    def label(part: pd.DataFrame, url: str, folder: str, partition_info: dict[str, int] | None = None) -> pd.DataFrame:
        import os
        import signal

        number = partition_info["number"] if partition_info else 0
        if number == 2 and trap.exists():
            trap.unlink()
            enrich_dataframe(part, "text", LABELS, base_url=url, limit=10, store_filepath=f"{folder}/{number}.sqlite3")
            os.kill(os.getpid(), signal.SIGKILL)
        return enrich_dataframe(part, "text", LABELS, base_url=url, store_filepath=f"{folder}/{number}.sqlite3")

    meta = enrich_dataframe(ddf._meta, "text", LABELS)
    labelled = ddf.map_partitions(label, server.url, str(tmp_path), meta=meta)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        frame = labelled.compute()
    assert frame_cells(frame) == expected(texts)
    asked = [text for call in server.calls for text in call.texts]
    assert sorted(set(asked)) == sorted(texts)
    assert not trap.exists()
    assert len(asked) == len(texts)


class TestSpecifications:
    def test_other_specifications_are_compared_at_no_call_with_corrected_shares_too(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(200)).enrich(model="gpt-4.1")
        bench.server.model.flips = 0.2
        bench.enrich(instructions="Be strict.", limit=50)
        bench.server.model.flips = 0.0
        bench.enrich(sample=80)
        code_sample(path)
        calls = len(bench.server.calls)
        assert bench.command("--gold", str(path)) == 0
        assert len(bench.server.calls) == calls
        printed = capsys.readouterr().out
        assert "do not count (instructions: 50 rows)\n" in printed
        assert re.search(r"^this run +200 +\d", printed, re.MULTILINE)
        assert re.search(r"^model gpt-4.1 +200 +\d", printed, re.MULTILINE)
        assert re.search(r"Corrected by what people coded:\n.*\nthis run.*%\)\nmodel gpt-4.1.*%\)\n", printed)
        told = json.loads(Path(f"{bench.output}.run.json").read_text())["specifications"]
        assert [(each["differs_in"], each["rows"]) for each in told] == [
            ([], 200), (["model gpt-4.1"], 200), (["instructions"], 50),
        ]  # fmt: skip
        assert told[0]["shares"] == told[1]["shares"]
        assert told[0]["corrected_shares"] == told[1]["corrected_shares"] != told[2]["corrected_shares"]


@pytest.mark.every_form
def test_every_cell_is_what_the_server_answered(bench: Bench) -> None:
    bench.write(make_texts(95)).enrich()
    bench.check()
    assert len(bench.server.calls) == 10
    assert sorted(bench.asked) == sorted(bench.texts)


def test_the_frame_is_what_pandas_reads_plus_nullable_labels(bench: Bench) -> None:
    bench.write([*make_texts(20), " "])
    frame = bench.enrich()
    assert frame[["id", "text"]].equals(pd.read_csv(bench.input))
    assert [str(frame[label].dtype) for label in LABELS] == ["Int8"] * 3
    assert frame[LABELS].head(20).astype(str).to_numpy().tolist() == expected(bench.texts[:20])
    assert frame[LABELS].iloc[20].isna().all()
    assert frame.attrs["enrichment"]["labelled_rows"] == 20
    assert frame.attrs["enrichment"]["blank_rows"] == {}
    assert frame.attrs["enrichment"]["calls"] == 2


@pytest.mark.every_form
def test_a_second_run_makes_no_call(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich()
    before = bench.output.read_bytes()
    bench.output.unlink()
    bench.enrich()
    assert len(bench.server.calls) == 3
    assert bench.output.read_bytes() == before


def test_a_second_run_needs_no_key(bench: Bench) -> None:
    bench.write(make_texts(3)).enrich()
    with sqlite3.connect(bench.store) as db:  # as if OpenAI had answered, whose server is the one that wants a key
        db.execute("UPDATE questions SET server = 'api.openai.com/v1'")
    db.close()
    bench.enrich(base_url=None)
    bench.check()


def test_equal_rows_are_asked_once(bench: Bench) -> None:
    bench.write(["an attack", "cake"] * 10).enrich()
    assert sorted(bench.asked) == ["an attack", "cake"]
    bench.check()


def test_rows_with_another_existing_label_are_other_rows(bench: Bench) -> None:
    bench.input.write_text("text,label\nattack,a\nattack,b\nattack,a\n")
    module.enrich_dataset(
        bench.input, bench.output, "text", "label", LABELS, base_url=bench.server.url, quiet=True, batch_size=1
    )
    sent = [call.body["messages"][1]["content"] for call in bench.server.calls]
    assert sorted(sent) == ['{"660":["attack","a"]}', '{"660":["attack","b"]}']


def test_added_rows_cost_only_themselves(bench: Bench) -> None:
    texts = make_texts(40)
    bench.write(texts[:30]).enrich()
    bench.write([*texts[30:], *reversed(texts[:30])]).enrich()
    assert sorted(bench.asked[30:]) == sorted(texts[30:])
    bench.check()


@pytest.mark.every_form
@pytest.mark.one_form
def test_one_more_label_asks_only_for_that_label(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich(LABELS[:2])
    bench.enrich(LABELS)
    assert [call.labels for call in bench.server.calls] == [tuple(LABELS[:2]), tuple(LABELS[2:])]
    bench.check()


def test_the_labels_that_are_asked_are_said_when_others_are_known(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(make_texts(10)).enrich(LABELS[:2])
    bench.enrich(quiet=False)
    assert "Labels to send (the others are known): ['sexual_harassment']\n" in capsys.readouterr().out


@pytest.mark.every_form
@pytest.mark.one_form
def test_fewer_or_reordered_labels_ask_nothing(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich()
    frame = bench.enrich([LABELS[2], LABELS[0]])
    assert len(bench.server.calls) == 1
    right = [[row[2], row[0]] for row in expected(bench.texts)]
    assert frame[[LABELS[2], LABELS[0]]].astype(str).to_numpy().tolist() == right


def test_answers_of_another_model_do_not_count(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich()
    bench.enrich(model="gpt-4.1")
    assert [call.body["model"] for call in bench.server.calls] == ["gpt-4o-mini", "gpt-4.1"]


@pytest.mark.every_form
@pytest.mark.one_form
def test_fresh_asks_again_and_the_newest_answer_stands(bench: Bench) -> None:
    bench.write(["cake"] * 3).enrich()
    answer = '{"660": ["personal_attacks"]}'
    completion = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    bench.server.script.append((200, {}, completion))
    bench.enrich(fresh=True)
    assert bench.cells == [["0", "1", "0"]] * 3
    bench.enrich()
    assert bench.cells == [["0", "1", "0"]] * 3
    assert len(bench.server.calls) == 2


def test_start_index_and_limit_send_only_their_window(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich(start_index=10, limit=5)
    assert sorted(bench.asked) == sorted(bench.texts[10:15])
    bench.check(blank_rows=[*range(10), *range(15, 30)])


def test_a_row_beyond_the_limit_with_the_text_of_one_within_it_is_filled_in_and_not_counted(bench: Bench) -> None:
    texts = [*make_texts(5), make_texts(5)[2], "another text"]
    frame = bench.write(texts).enrich(limit=5)
    bench.check(blank_rows=[6])
    assert run_figures(frame)["labelled_rows"] == 5


def test_rows_outside_the_window_keep_what_the_store_has(bench: Bench) -> None:
    bench.write(make_texts(30)).enrich(limit=10)
    bench.enrich(start_index=20)
    bench.check(blank_rows=range(10, 20))


def test_blank_texts_are_not_sent_and_stay_blank(bench: Bench) -> None:
    bench.write(["", "  \t", "cake"]).enrich()
    assert bench.asked == ["cake"]
    bench.check(blank_rows=[0, 1])


@pytest.mark.every_form
@pytest.mark.one_form
def test_a_label_column_of_the_input_keeps_its_cells_and_only_blanks_are_asked(bench: Bench) -> None:
    bench.input.write_text(
        'text,personal_attacks,id\nan attack,0,1\n"two\nattacks",,2\nthree attacks,"",3\ncake,1,4\ntram, ,5\n'
    )
    frame = bench.enrich(["personal_attacks"])
    assert sorted(bench.asked) == ["three attacks", "tram", "two\nattacks"]
    assert bench.output.read_text() == (
        'text,personal_attacks,id\nan attack,0,1\n"two\nattacks",1,2\nthree attacks,"1",3\ncake,1,4\ntram,0,5\n'
    )
    assert frame["personal_attacks"].tolist() == [0, 1, 1, 1, 0]
    assert list(frame.columns) == ["text", "personal_attacks", "id"]


@pytest.mark.every_form
def test_equal_rows_of_which_some_have_cells_are_asked_once_for_all_that_is_lacking(bench: Bench) -> None:
    labels = LABELS[:2]
    bench.input.write_text("text,praising_violence,personal_attacks\nattack,1,\nattack,,0\nattack,1,1\n")
    bench.enrich(labels)
    assert [call.texts for call in bench.server.calls] == [("attack",)]
    assert bench.output.read_text() == "text,praising_violence,personal_attacks\nattack,1,1\nattack,0,0\nattack,1,1\n"


def test_the_output_may_be_the_next_input(bench: Bench) -> None:
    bench.write(make_texts(10)).enrich(LABELS[:1])
    bench.output.rename(bench.input)
    bench.enrich()
    bench.check()
    assert [len(call.labels) for call in bench.server.calls] == [1, 2]


def test_a_file_with_a_header_alone_gets_its_new_columns(bench: Bench) -> None:
    bench.write([]).enrich()
    assert bench.output.read_text() == "id,text,praising_violence,personal_attacks,sexual_harassment\n"
    assert bench.server.calls == []


def test_workers_call_at_the_same_time(bench: Bench) -> None:
    bench.server.model.first_token = 0.2
    bench.write(make_texts(40)).enrich(batch_size=5, max_workers=4)
    assert bench.server.most_in_flight == 4
    bench.check()


def test_one_worker_makes_one_call_at_a_time(bench: Bench) -> None:
    bench.write(make_texts(40)).enrich(batch_size=5, max_workers=1)
    calls = sorted(bench.server.calls, key=lambda call: call.at)
    assert all(one.ended <= next_one.at for one, next_one in itertools.pairwise(calls))
    bench.check()


def test_the_csv_is_written_while_the_run_goes_on(bench: Bench) -> None:
    bench.timing = module.Timing(between_saves=0.0)
    bench.server.model.first_token = 0.02
    seen = []
    bench.server.on_call = lambda number, body: seen.append(bench.output.exists())
    bench.write(make_texts(60)).enrich(max_workers=1)
    assert not seen[0]
    assert seen[-1]


def test_a_csv_that_cannot_be_written_meanwhile_does_not_end_the_job(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.timing = module.Timing(between_saves=0.0)
    bench.server.model.first_token = 0.04

    def block_and_free(number: int, body: Any) -> None:
        if number == 1:
            bench.output.unlink(missing_ok=True)
            bench.output.mkdir()
        if number == 25 and bench.output.is_dir():
            bench.output.rmdir()

    bench.server.on_call = block_and_free
    bench.write(make_texts(300)).enrich(max_workers=1, quiet=False)
    assert "Not saved yet: " in capsys.readouterr().err
    bench.check()


def test_a_run_in_another_thread_works(bench: Bench) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bench.write(make_texts(10))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bench.enrich).result()
    bench.check()
