"""Options: each is checked where it is made, and has one default, one name and one line of help."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import LABELS, ROOT, Bench, write_rows
from stand_in_server import StandIn

import enrich_dataset as module


def test_in_python_a_label_may_hold_commas_joiners_and_odd_blanks_and_labels_be_any_sequence(bench: Bench) -> None:
    labels = ["attacks, of any kind", "\u0645\u06cc\u200c\u062e", "\U0001f468\u200d\U0001f469", "a\u00a0b"]
    bench.write(["an attack"])
    for given in (labels, pd.Series(labels), pd.Index(labels), np.array(labels), (label for label in labels)):
        frame = bench.enrich(given)  # type: ignore[arg-type]
        assert list(frame[labels].iloc[0]) == [1, 0, 0, 0]
    assert len(bench.server.calls) == 1


def test_the_default_model_changes_on_the_day_on_which_the_old_one_ends(bench: Bench) -> None:
    assert module.default_model(date(2027, 1, 13)) == "gpt-4o-mini"
    assert module.default_model(date(2027, 1, 14)) == "gpt-6-luna"
    bench.write(["cake"]).enrich()
    arguments = [
        word for word in bench.arguments("--base-url", bench.server.url) if word not in {"--model", "gpt-4o-mini"}
    ]
    code = "import datetime, sys\nday = datetime.date(2027, 1, 14)\n"
    code += "datetime.date = type('date', (datetime.date,), {'today': staticmethod(lambda: day)})\n"
    code += f"import enrich_dataset\nsys.exit(enrich_dataset.main({arguments!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Model: gpt-6-luna, the default since 2027-01-14, on which gpt-4o-mini was shut down\n" in run.stdout
    assert re.search("^model gpt-4o-mini +1 ", run.stdout, re.MULTILINE)
    assert bench.server.calls[-1].body["model"] == "gpt-6-luna"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"price": 0.5}, r"price must be 2 numbers \(IN, OUT\), not 0.5"),
        ({"max_cost": (1, 2)}, r"max_cost must be a number, not \(1, 2\)"),
        ({"answer_form": "long"}, "answer_form must be list, each, one, not 'long'"),
        ({"batch_size": 2.5}, "whole number or auto, not 2.5"),
        ({"batch_size": True}, "whole number or auto, not True"),
        ({"timeout": None}, "timeout must be a number, not None"),
        ({"limit": "auto"}, "limit must be a whole number, not 'auto'"),
        ({"new_labels": "racist"}, r"pass \['racist'\]"),
        ({"new_labels": []}, "pass at least one"),
        ({"new_labels": [None]}, "printable"),
    ],
)
def test_options_of_a_wrong_type_are_refused(bench: Bench, options: dict[str, object], message: str) -> None:
    with pytest.raises(module.InputError, match=message):
        bench.write(["cake"]).enrich(**({"labels": options.pop("new_labels", LABELS)} | options))  # type: ignore[arg-type]


def test_each_default_is_written_once(bench: Bench) -> None:
    options = vars(module.build_parser().parse_args(bench.arguments()))
    for name, parameter in inspect.signature(module.enrich_dataset).parameters.items():
        assert name in options
        if parameter.default is not parameter.empty:
            assert options[name] == parameter.default


def test_the_users_ten_parameters_stand_first_and_the_rest_are_by_name() -> None:
    parameters = inspect.signature(module.enrich_dataset).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "input_filepath", "output_filepath", "text_column", "label_column", "new_labels", "api_key", "model",
        "batch_size", "start_index", "max_workers",
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), [({"model": None}, "model is blank"), ({"labels": None}, "No labels")])
def test_none_for_what_has_to_be_given_is_refused(bench: Bench, given: dict[str, Any], words: str) -> None:
    with pytest.raises(module.InputError, match=words):
        bench.write(["cake"]).enrich(**given)


def test_a_string_is_no_list_of_columns(bench: Bench) -> None:
    with pytest.raises(module.InputError, match=r"context must be a list, not a string: pass \['thread'\]"):
        write_rows(bench).enrich(context="thread")


def test_numpys_numbers_are_taken_and_cells_with_lists_refused(server: StandIn) -> None:
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame({"text": ["an attack"], 1: [5]})
    labelled = module.enrich_dataframe(
        frame, "text", ["1", "attack"], base_url=server.url, batch_size=np.int64(5), timeout=np.float32(60)
    )
    assert list(labelled.columns) == ["text", 1, "1", "attack"]
    assert labelled["attack"].tolist() == [1]
    for column in ("text", "label"):
        odd = pd.DataFrame({"text": ["a"], "label": ["b"]}).astype(object)
        odd.at[0, column] = ["a", "list"]
        with pytest.raises(module.InputError, match=f"Row 0 of the column '{column}' holds a list: make it a text"):
            module.enrich_dataframe(odd, "text", ["x"], label_column="label", base_url=server.url)


def test_a_home_folder_and_any_path_like_will_do(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/stdin", "is a device or a pipe, which can be read but once: save it first"),
        ("https://example.org/x.csv", "is an address: download the file"),
        ("s3://bucket/x.csv", "is an address: download the file"),
    ],
)
def test_what_is_no_file_is_refused_with_the_reason(
    bench: Bench, path: str, words: str, capsys: pytest.CaptureFixture[str]
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
