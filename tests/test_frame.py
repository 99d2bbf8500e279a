"""A DataFrame in, a labelled copy out; and many of them at once on Dask."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow
import pytest
from conftest import LABELS, expected, make_texts
from stand_in_server import StandIn

from enrich_dataset import BudgetExceeded, InputError, ProviderError, enrich_dataframe, enrich_dataset


def enrich(df: pd.DataFrame, server: StandIn, **options: Any) -> pd.DataFrame:
    return enrich_dataframe(df, "text", LABELS, base_url=server.url, **options)


def cells(frame: pd.DataFrame) -> list[list[str]]:
    return [["" if value is pd.NA else str(value) for value in row] for row in frame[LABELS].to_numpy().tolist()]


def test_the_copy_has_label_columns_and_else_nothing_new(server: StandIn) -> None:
    texts = make_texts(30)
    df = pd.DataFrame({"when": pd.date_range("2026-01-01", periods=30), "text": texts}, index=range(100, 130))
    before = df.copy()
    frame = enrich(df, server)
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_frame_equal(frame.drop(columns=LABELS), before)
    assert cells(frame) == expected(texts)
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
            enrich(other, server)
    for name in ("gold", "examples"):
        with pytest.raises(InputError, match=rf"{name} must be a path or a pandas DataFrame: call \.to_pandas\(\)"):
            enrich(df, server, **{name: pyarrow.table(df)})
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
        enrich(Sealed({"text": ["cake"]}), server)
    path = tmp_path / "in.csv"
    path.write_text("text\n" + "cake\n" * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd, "read_csv", lambda *_, **__: 1 / 0)  # a fault of pandas (23694, below its version 3.1)
        with pytest.raises(InputError, match=r"cannot read .*in\.csv as a DataFrame \(ZeroDivisionError\)"):
            enrich_dataset(path, tmp_path / "out.csv", "text", None, LABELS, base_url=server.url)
    assert server.calls == []


def test_missing_texts_stay_blank(server: StandIn) -> None:
    df = pd.DataFrame({"text": ["violence", None, np.nan, " ", 7]})
    assert cells(enrich(df, server)) == [*expected(["violence"]), *[[""] * 3] * 3, *expected(["7"])]


def test_an_existing_label_is_sent_and_known_cells_are_kept(server: StandIn) -> None:
    df = pd.DataFrame(
        {"text": ["violence", "cake"], "label": ["hate", None], LABELS[0]: [0.0, np.nan], LABELS[1]: [True, None]}
    )
    frame = enrich(df, server, label_column="label")
    assert cells(frame) == [["0", "1", "0"], ["0", "0", "0"]]
    calls = {call.labels: call.body["messages"][1]["content"] for call in server.calls}
    assert calls[LABELS[2],] == '{"660":["violence","hate"]}'
    assert calls[tuple(LABELS)] == '{"660":["cake",""]}'


def test_nothing_is_printed_unless_asked(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    enrich(pd.DataFrame({"text": ["cake"]}), server)
    assert capsys.readouterr() == ("", "")
    enrich(pd.DataFrame({"text": ["cake"]}), server, quiet=False)
    printed = capsys.readouterr().out
    assert printed.startswith("Text column: 'text'\n")
    assert "saved to" not in printed


def test_answers_live_in_a_store_only_if_there_is_one(server: StandIn, tmp_path: Path) -> None:
    df = pd.DataFrame({"text": ["cake"]})
    for store, calls in ((None, 2), (tmp_path / "answers.sqlite3", 1)):
        server.calls.clear()
        for _ in range(2):
            enrich(df, server, store_filepath=store)
        assert len(server.calls) == calls


def test_a_run_without_a_store_that_ends_early_says_how_to_keep_its_answers(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    server.gate.key = "another"
    with pytest.raises(ProviderError):
        enrich(pd.DataFrame({"text": ["cake"]}), server, quiet=False)
    assert (
        "Stopped: 0 of 1 rows were labelled. Only this exception's `frame` has them: pass store_filepath to keep answers."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_ends_early_hands_over_what_was_labelled(server: StandIn, tmp_path: Path, kept: bool) -> None:
    texts = make_texts(200)
    options: dict[str, Any] = {"store_filepath": tmp_path / "answers"} if kept else {}
    with pytest.raises(BudgetExceeded) as capped:
        enrich(pd.DataFrame({"text": texts}), server, max_cost=0.002, **options)
    assert capped.value.frame is not None
    labelled = int(capped.value.frame[LABELS[0]].notna().sum())
    assert 0 < labelled == sum(len(call.texts) for call in server.calls) < 200
    assert cells(capped.value.frame)[:labelled] == expected(texts)[:labelled]
    assert ("Only this exception's `frame` has them: pass store_filepath" in str(capped.value)) is not kept


def test_an_interrupt_hands_over_what_was_labelled_and_has_a_text(server: StandIn) -> None:
    server.on_call = lambda number, body: os.kill(os.getpid(), signal.SIGINT) if number == 2 else None
    with pytest.raises(KeyboardInterrupt, match=r"Stopped: \d+ of 100 rows were labelled") as stopped:
        enrich(pd.DataFrame({"text": make_texts(100)}), server, max_workers=1)
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
        enrich(df, server)


def test_an_unknown_option_is_refused(server: StandIn) -> None:
    with pytest.raises(TypeError, match=r"^enrich_dataframe\(\) got an unexpected keyword argument 'batchsize'$"):
        enrich(pd.DataFrame({"text": ["cake"]}), server, batchsize=3)


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
    assert cells(frame) == expected(texts)
    asked = [text for call in server.calls for text in call.texts]
    assert sorted(set(asked)) == sorted(texts)
    assert not trap.exists()
    assert len(asked) == len(texts)
