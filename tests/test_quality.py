"""How good the labels are: codebook, examples, audit, comparison with people, the record, the picture."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import LABELS, ROOT, Bench, expected, make_texts

import enrich_dataset as module

CODEBOOK = {label: f"what {label} means" for label in LABELS}


def figures(frame: pd.DataFrame) -> dict[str, Any]:
    return dict(frame.attrs["enrichment"])


def system_message(bench: Bench) -> str:
    return str(bench.server.calls[-1].body["messages"][0]["content"])


def write_examples(bench: Bench, *texts: str, name: str = "examples.csv") -> Path:
    path = bench.input.with_name(name)
    frame = pd.DataFrame(expected(texts), columns=LABELS)
    frame.insert(0, "text", texts)
    frame.to_csv(path, index=False)
    return path


class TestCodebook:
    def test_definitions_stand_in_the_system_message(self, bench: Bench) -> None:
        bench.write(["cake"]).enrich(CODEBOOK)
        assert '"praising_violence": what praising_violence means\n' in system_message(bench)
        bench.check()

    def test_a_changed_definition_asks_that_label_again_and_no_other(self, bench: Bench) -> None:
        labels = {f"label_{place}": f"meaning {place}" for place in range(10)}
        bench.write(make_texts(30)).enrich(labels)
        bench.server.calls.clear()
        bench.enrich(labels | {"label_4": "another meaning"})
        assert {call.labels for call in bench.server.calls} == {("label_4",)}
        assert sorted(bench.asked) == sorted(bench.texts)
        bench.server.calls.clear()
        bench.enrich(labels)
        assert bench.server.calls == []

    @pytest.mark.parametrize("form", ["json", "csv"])
    def test_the_command_reads_it_from_a_file(self, bench: Bench, form: str) -> None:
        path = bench.input.with_name(f"codebook.{form}")
        if form == "json":
            path.write_text(json.dumps(CODEBOOK))
        else:
            pd.DataFrame({"label": CODEBOOK.keys(), "definition": CODEBOOK.values()}).to_csv(path, index=False)
        bench.write(["cake", "violence"])
        arguments = [argument for argument in bench.arguments() if argument not in {"--labels", *LABELS}]
        base = ["--base-url", bench.server.url, "--quiet", "--codebook", str(path)]
        assert module.main([*arguments, *base]) == 0
        bench.check()
        assert '"praising_violence": what praising_violence means\n' in system_message(bench)
        assert module.main([*arguments, *base, "--labels", LABELS[0]]) == 0
        assert len(bench.server.calls) == 1

    @pytest.mark.parametrize(
        ("content", "arguments", "words"),
        [
            ('{"a": "b"}', ["--labels", "c"], "The label 'c' is not in"),
            ('{"a": "b", "a": "c"}', [], "The label 'a' appears more than once"),
            ('{"a": 1}', [], "The definition of 'a' must be a non-empty string"),
            ('{"a": ', [], "is not valid JSON"),
            ("name,meaning\na,b\n", [], "The column 'label' is not in the header of"),
            ("", [], "is empty: a CSV with a header line was expected"),
            ("label,definition\n", [], "No labels were given"),
            (None, [], "cannot be read"),
        ],
    )
    def test_one_that_cannot_be_used_is_refused(
        self, bench: Bench, content: str | None, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.input.with_name("codebook")
        if content is not None:
            path.write_text(content)
        given = ["--input", str(bench.input), "--output", str(bench.output), "--text-column", "text"]
        assert module.main([*given, "--codebook", str(path), *arguments]) == 2
        assert words in capsys.readouterr().err

    def test_an_unquoted_comma_is_refused_and_other_delimiters_are_read(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.input.with_name("codebook.csv")
        path.write_text("label,definition\nracist,attacks people, because of race\n")
        given = ["--input", str(bench.input), "--output", str(bench.output), "--text-column", "text", "--quiet"]
        given += ["--codebook", str(path), "--base-url", bench.server.url]
        bench.write(["cake"])
        assert module.main(given) == 2
        line = f"Error: {path}, line 2: this record has 3 fields, the header has 2: fix the row, or quote the field"
        assert capsys.readouterr().err.startswith(line)
        assert bench.server.calls == []
        path.write_bytes("label;definition\nracist;attacks people, because of racé\n".encode("cp1252"))
        assert module.main(given) == 0
        assert '"racist": attacks people, because of racé\n' in system_message(bench)
        path.write_text("label,definition\nracist, \n")
        assert module.main(given) == 2
        assert "The definition of 'racist' must be a non-empty string" in capsys.readouterr().err

    def test_without_labels_and_codebook_there_is_nothing_to_do(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert module.main(["--input", "a", "--output", "b", "--text-column", "c"]) == 2
        assert "pass --labels NAME ..., or --codebook FILE." in capsys.readouterr().err

    def test_definitions_are_texts(self, bench: Bench) -> None:
        with pytest.raises(module.InputError, match="The definition of 'a' must be a non-empty string"):
            bench.write(["cake"]).enrich({"a": 1})  # type: ignore[dict-item]


class TestInstructions:
    def test_they_stand_in_the_system_message_as_a_text_or_from_a_file(self, bench: Bench) -> None:
        words = "Only what {is} said to persons counts."
        path = bench.input.with_name("instructions.txt")
        path.write_text(f"{words}\n")
        bench.write(["cake"]).enrich(instructions=words)
        assert f"This project's instructions:\n{words}\n" in system_message(bench)
        bench.enrich(instructions=path)
        assert bench.command("--quiet", "--instructions", str(path)) == 0
        assert len(bench.server.calls) == 1

    def test_other_ones_ask_anew(self, bench: Bench) -> None:
        bench.write(["cake"]).enrich(instructions="One.")
        bench.enrich(instructions="Two.")
        bench.enrich()
        assert len(bench.server.calls) == 3

    def test_a_file_that_is_not_there_is_refused(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(
            module.InputError, match=r"There is no file /nowhere/instructions.txt: check the path of the instructions\."
        ):
            bench.write(["cake"]).enrich(instructions=Path("/nowhere/instructions.txt"))
        assert bench.command("--instructions", "instructoins.txt") == 2
        assert "There is no file instructoins.txt: check the path of the instructions." in capsys.readouterr().err
        assert bench.server.calls == []


class TestExamples:
    def test_they_stand_in_the_system_message_in_the_answers_own_form(self, bench: Bench) -> None:
        path = write_examples(bench, "praise the violence", "tram")
        bench.write(["cake"]).enrich(examples=path)
        message = system_message(bench)
        assert '{"638":"praise the violence","127":"tram"}' in message
        assert message.endswith('Its right answer:\n{"638":["praising_violence"],"127":[]}')

    def test_rows_equal_to_one_are_answered_from_it_and_not_sent(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        frame = pd.DataFrame([["cake", 1, 1, 1]], columns=["text", *LABELS])
        labelled = bench.write(["tram", "cake", "cake"]).enrich(examples=frame, quiet=False)
        assert bench.cells == [["0"] * 3, ["1"] * 3, ["1"] * 3]
        assert bench.asked == ["tram"]
        assert figures(labelled)["example_rows"] == 2
        assert figures(labelled)["reused_rows"] == 0
        assert "Rows equal to an example (labelled from it, not sent): 2\n" in capsys.readouterr().out

    def test_other_ones_ask_anew_and_a_label_that_is_added_does_not(self, bench: Bench) -> None:
        bench.write(["cake"])
        bench.enrich(LABELS[:2], examples=write_examples(bench, "tram"))
        bench.enrich(examples=write_examples(bench, "tram"))
        assert [call.labels for call in bench.server.calls] == [tuple(LABELS[:2]), (LABELS[2],)]
        bench.enrich(examples=write_examples(bench, "tram", "holiday"))
        assert bench.server.calls[-1].labels == tuple(LABELS)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (f"text,{','.join(LABELS)}\n", "have no rows"),
            (f"text,{','.join(LABELS)}\na,1,,0\n", "has a blank for 'personal_attacks'"),
            (f"text,{','.join(LABELS[:2])}\na,1,0\n", "has a blank for 'sexual_harassment'"),
            (f"text,{','.join(LABELS)}\n,1,0,0\n", "has a blank for 'text'"),
            ("words\na\n", "The text column 'text' is not in the header of"),
            (f"text,{','.join(LABELS)}\n{'a' * 20_000},1,0,0\n", r"are too many: 20,014 characters \(at most 20,000"),
            (f"text,{','.join(LABELS)}\n" + "".join(f"{n},1,0,0\n" for n in range(391)), r"rows: 391 \(at most 390\)"),
            (f"text,{','.join(LABELS)}\na,1,0,0\na,0,0,0\n", "have one text with different labels"),
        ],
    )
    def test_ones_that_cannot_be_used_are_refused(self, bench: Bench, content: str, words: str) -> None:
        path = bench.input.with_name("examples.csv")
        path.write_text(content)
        with pytest.raises(module.InputError, match=words):
            bench.write(["cake"]).enrich(examples=path)
        assert bench.server.calls == []


class TestAudit:
    def test_it_finds_the_share_that_packing_changes(self, bench: Bench) -> None:
        bench.server.model.flips = 0.1
        told = figures(bench.write(make_texts(600)).enrich(audit=400))["audit"]
        for values in told.values():
            low, high = values["agreement_95"]
            assert values["rows"] == 400
            assert low < 0.9 < high
            assert 0 < values["kappa"] < 1
            assert len(values["rows_that_differ"]) == round(400 * (1 - values["agreement"]))

    def test_with_an_exact_annotator_kappa_is_1_and_labels_stay(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = figures(bench.write(make_texts(60)).enrich(audit=30, quiet=False))["audit"]
        for values in told.values():
            assert (values["agreement"], values["kappa"], values["rows_that_differ"]) == (1.0, 1.0, [])
        bench.check()
        printed = capsys.readouterr().out
        assert "Auditing 30 rows, each alone in its call: 30 API calls...\n" in printed
        assert "=== Audit: re-queried, each row alone, each label forced ===\n" in printed
        assert [len(call.texts) for call in bench.server.calls] == [10] * 6 + [1] * 30

    def test_its_answers_never_become_labels(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich()
        with module.Store(bench.store) as store:
            store.db.execute("UPDATE attempts SET answers = replace(answers, '0', '1')")
            store.db.commit()
        told = figures(bench.enrich(audit=20))["audit"]
        assert bench.cells == [["1"] * 3] * 20
        assert all(values["agreement"] < 1 for values in told.values())

    def test_its_bar_shows_its_own_rows_per_second(self, bench: Bench) -> None:
        bench.server.model.first_token = 0.1
        process = bench.write(make_texts(300)).process("--batch-size", "100", "--audit", "6", "--max-workers", "1")
        _, errors = process.communicate(timeout=60)
        (rate,) = re.findall(r"6/6 \[.*?, (\d+) rows/s", errors)
        assert 3 <= int(rate) <= 12

    def test_cells_that_the_input_gives_are_not_audited(self, bench: Bench) -> None:
        bench.input.write_text(f"text,{LABELS[0]}\nviolence,0\ntram,\n")
        told = figures(bench.enrich(audit=10))["audit"]
        assert {values["rows"] for values in told.values()} == {1}

    def test_it_is_paid_once_and_a_larger_one_holds_the_smaller(self, bench: Bench) -> None:
        bench.write(make_texts(40)).enrich(audit=10)
        calls = len(bench.server.calls)
        bench.enrich(audit=10)
        assert len(bench.server.calls) == calls
        bench.enrich(audit=15)
        assert len(bench.server.calls) == calls + 5
        bench.enrich(audit=10, seed=1)
        assert len(bench.server.calls) > calls + 5

    def test_it_goes_by_jobs_too(self, bench: Bench) -> None:
        frame = bench.write(make_texts(20)).enrich(audit=10, use_batch_api=True, poll_interval=0.05)
        assert {values["rows"] for values in figures(frame)["audit"].values()} == {10}
        assert {call.job for call in bench.server.calls} == {"batch_1", "batch_2"}

    def test_the_cap_counts_it(self, bench: Bench) -> None:
        bench.write(make_texts(20)).enrich()
        with pytest.raises(module.BudgetExceeded):
            bench.enrich(audit=20, max_cost=0.0005)
        bench.check()

    def test_a_dry_run_tells_its_calls_too(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        bench.write(make_texts(20)).enrich(dry_run=True, quiet=False)
        plain = capsys.readouterr().out
        bench.enrich(dry_run=True, audit=20, quiet=False)
        audited = capsys.readouterr().out
        tokens = [
            int(text.partition("tokens (schema included): ")[2].partition(" in")[0].replace(",", ""))
            for text in (plain, audited)
        ]
        assert tokens[1] > 5 * tokens[0]
        bench.enrich()
        capsys.readouterr()
        bench.enrich(dry_run=True, audit=20, quiet=False)
        assert "(schema included): 0 in" not in capsys.readouterr().out


def random_tables() -> list[tuple[pd.DataFrame, pd.DataFrame, list[str]]]:
    dice = np.random.default_rng(7)
    tables = []
    for number in range(200):
        rows, labels = int(dice.integers(1, 40)), [f"l{place}" for place in range(int(dice.integers(1, 5)))]
        share = (0.0, 0.5, 1.0, 0.1)[number % 4]  # no positives, some, all
        people, model = (
            pd.DataFrame((dice.random((rows, len(labels))) < p).astype(int), columns=labels)
            for p in (share, dice.random())
        )
        tables.append((model, people, labels))
    return tables


class TestGold:
    def test_the_figures_are_scikit_learns_to_1e_12_on_200_random_tables(self) -> None:
        from sklearn.metrics import accuracy_score, cohen_kappa_score, precision_recall_fscore_support

        nan = float("nan")
        for model, people, labels in random_tables():
            table = module.evaluate_labels(model, people, labels)
            for label in labels:
                one, other = people[label], model[label]
                precision, recall, f1, _ = precision_recall_fscore_support(
                    one, other, average="binary", zero_division=nan
                )
                with np.errstate(invalid="ignore"), pytest.MonkeyPatch.context():
                    kappa = cohen_kappa_score(one, other) if len(set(one) | set(other)) > 1 else nan
                right = [precision, recall, f1, accuracy_score(one, other), kappa]
                found = table.loc[label, ["precision", "recall", "f1", "accuracy", "kappa"]].astype(float)
                np.testing.assert_allclose(found, right, rtol=0, atol=1e-12)
                assert table.loc[label, "support"] == one.sum()
            for average in ("micro", "macro"):
                right = precision_recall_fscore_support(
                    people.to_numpy().reshape(len(people), -1), model.to_numpy().reshape(len(people), -1),
                    average=average, zero_division=nan,
                )[:3] if len(labels) > 1 else None  # fmt: skip
                if right:
                    found = table.loc[f"{average} average", ["precision", "recall", "f1"]].astype(float)
                    np.testing.assert_allclose(found, np.array(right, dtype=float), rtol=0, atol=1e-12)

    def test_what_is_not_defined_is_blank_and_no_0(self) -> None:
        none = pd.DataFrame({"a": [0, 0, 0]})
        table = module.evaluate_labels(none, none, ["a"])
        assert table.loc["a", ["precision", "recall", "f1", "kappa"]].isna().all()
        assert table.loc["a", "accuracy"] == 1
        assert table.loc["macro average", ["precision", "recall", "f1", "kappa"]].isna().all()

    def test_pairs_with_a_blank_are_left_out(self) -> None:
        model = pd.DataFrame({"a": pd.array([1, None, 0, 1], dtype="Int8")}, index=list("wxyz"))
        people = pd.DataFrame({"a": [1.0, 1.0, None, 0.0, 1.0]}, index=[*"wxyz", "elsewhere"])
        table = module.evaluate_labels(model, people, ["a"])
        assert table.loc["a", ["rows", "tp", "fp", "fn", "tn"]].tolist() == [2, 1, 1, 0, 0]

    def test_a_key_that_stands_twice_is_refused(self) -> None:
        twice = pd.DataFrame({"a": [0, 1]}, index=["x", "x"])
        with pytest.raises(module.InputError, match="appears more than once"):
            module.evaluate_labels(twice, twice, ["a"])

    def test_the_command_compares_by_text(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_examples(bench, "violence", "praise", "not in the table", name="gold.csv")
        assert bench.write(["violence", "praise", "cake", "cake"]).command("--gold", str(path)) == 0
        printed = capsys.readouterr().out
        assert "=== Comparison with people, with 95 % intervals ===\n" in printed
        assert "micro average         6" in printed
        assert "Gold rows that are not in the table: 1\n" in printed

    def test_rows_that_people_labelled_and_the_model_did_not_are_told(self, bench: Bench) -> None:
        gold = pd.DataFrame({"text": ["violence", "poison-refusal", "elsewhere"], LABELS[0]: [1, 1, 1]})
        told = figures(bench.write(["violence", "poison-refusal"]).enrich(gold=gold))
        assert told["gold_unmatched"] == {"not in the table": 1, "not labelled": 1, "not coded": 0}
        assert told["gold"][LABELS[0]]["rows"] == 1

    def test_a_key_column_tells_equal_texts_apart(self, bench: Bench) -> None:
        gold = pd.DataFrame({"id": [2, 0], LABELS[0]: [1, 1]})
        told = figures(bench.write(["violence", "praise", "cake"]).enrich(gold=gold, gold_key="id"))["gold"]
        assert told[LABELS[0]]["tp"] == told[LABELS[0]]["fn"] == 1
        assert set(told) == {LABELS[0], "micro average", "macro average"}

    def test_equal_texts_with_other_labels_cannot_be_matched_by_text(self, bench: Bench) -> None:
        bench.input.write_text(f"text,{LABELS[0]}\ncake,1\ncake,0\n")
        gold = pd.DataFrame({"text": ["cake"], LABELS[0]: [1]})
        with pytest.raises(module.InputError, match="pass gold_key and a column that is unique"):
            bench.enrich(gold=gold)

    def test_different_rows_of_one_key_are_refused_before_anything_is_sent(self, bench: Bench) -> None:
        bench.input.write_text("text,label\ncake,a\ncake,b\n")
        gold = pd.DataFrame({"text": ["cake"], LABELS[0]: [1]})
        with pytest.raises(module.InputError, match=r"Different rows of .* have the same 'text' as a gold row"):
            module.enrich_dataset(
                bench.input, bench.output, "text", "label", LABELS, gold=gold, base_url=bench.server.url
            )
        assert bench.server.calls == []

    def test_what_pandas_writes_is_understood_and_anything_else_is_named(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = bench.input.with_name("gold.csv")
        path.write_text(f"text,{LABELS[0]},{LABELS[1]}\nviolence,1.0,True\ncake,0.0,FALSE\ntram,,\n")
        told = figures(bench.write(["violence", "cake"]).enrich(gold=path))
        assert told["gold"][LABELS[1]]["support"] == 1
        path.write_text(f"text,{LABELS[0]}\nviolence,1\ncake,yes\n")
        assert bench.command("--gold", str(path)) == 2
        line = f"{path}, row 1 (line 3): the column '{LABELS[0]}' holds 'yes', not 1, 0, true, false or blank: fix the cell.\n"
        assert line in capsys.readouterr().err

    def test_columns_that_match_no_label_are_named(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = bench.input.with_name("gold.csv")
        path.write_text(f"text,{LABELS[0].title()},{LABELS[1]},note\ncake,1,0,fine\n")
        assert bench.write(["cake"]).command("--gold", str(path)) == 0
        line = f"Gold columns that match no label (not compared): {LABELS[0].title()}, note\n"
        assert line in capsys.readouterr().out

    def test_a_key_that_occurs_twice_is_refused(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = bench.input.with_name("gold.csv")
        path.write_text(f"id,{LABELS[0]}\n0,1\n1,1\n0,0\n")
        assert bench.write(["cake", "tram"]).command("--gold", str(path), "--gold-key", "id") == 2
        errors = capsys.readouterr().err
        assert "have the same 'id' in row 0 (line 2) and row 2 (line 4): remove one, or pass --gold-key" in errors
        assert bench.server.calls == []

    def test_disagreements_are_listed_without_texts(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = bench.input.with_name("gold.csv")
        path.write_text(f"id,{LABELS[0]},{LABELS[1]}\n2,1,0\n0,0,1\n")
        bench.write(["violence", "two\nlines", "attack"])
        assert bench.command("--gold", str(path), "--gold-key", "id") == 0
        listed = Path(f"{bench.output}.disagreements.csv")
        assert f"Where the model, people or coders differ: {listed}\n" in capsys.readouterr().out
        assert listed.read_text().split() == [
            "row,line,key,label,model,people", "0,2,0,praising_violence,1,0", "0,2,0,personal_attacks,0,1",
            "2,5,2,praising_violence,0,1", "2,5,2,personal_attacks,1,0",
        ]  # fmt: skip
        path.write_text(f"text,{LABELS[0]}\nviolence,0\n")
        assert bench.command("--gold", str(path)) == 0
        assert listed.read_text().split()[1:] == ["0,2,,praising_violence,1,0"]

    @pytest.mark.parametrize(
        ("gold", "options", "words"),
        [
            (pd.DataFrame({"text": ["cake"], "other": [1]}), {}, "have no 0 or 1 in a column of any label"),
            (pd.DataFrame({"words": ["cake"]}), {}, r"The gold key \(gold_key\) 'text' is not in the header"),
            (None, {"gold_key": "id"}, "gold_key needs gold labels"),
            (pd.DataFrame({"id": [1]}), {"gold_key": "nr"}, "'nr' is not in the header"),
        ],
    )
    def test_gold_that_cannot_be_used_is_refused_before_anything_is_sent(
        self, bench: Bench, gold: pd.DataFrame | None, options: dict[str, str], words: str
    ) -> None:
        with pytest.raises(module.InputError, match=words):
            bench.write(["cake"]).enrich(gold=gold, **options)
        assert bench.server.calls == []


class TestFigures:
    def test_wilsons_interval_of_a_known_case(self) -> None:
        low, high = module.wilson(15, 148)  # Newcombe (1998), table I
        assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
        assert module.wilson(0, 20)[0] == pytest.approx(0)
        assert all(math.isnan(bound) for bound in module.wilson(0, 0))

    def test_the_shares_by_the_existing_label_end_the_summary(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.input.write_text("text,label\nviolence,hate\ncake,hate\ntram,nothate\nholiday,\n")
        arguments = bench.arguments("--label-column", "label", "--base-url", bench.server.url)
        assert module.main(arguments) == 0
        table = (
            capsys.readouterr()
            .out.partition("=== Share of each label by 'label' (shown to the model) ===\n")[2]
            .splitlines()
        )
        assert table[0].split() == ["hate", "nothate", "(blank)"]
        assert table[1].split() == ["praising_violence", "50.0%", "0.0%", "0.0%"]


class TestRecord:
    def test_it_has_what_an_appendix_needs_and_no_key_and_no_text(self, bench: Bench) -> None:
        texts = [f"{text}, my own words" for text in make_texts(30)]
        examples = write_examples(bench, "a secret example")
        bench.write(texts).enrich(CODEBOOK, examples=examples, audit=5, api_key="sk-secret", seed=4)
        path = Path(f"{bench.output}.run.json")
        written = path.read_text(encoding="utf-8")
        assert "own words" not in written
        assert "secret" not in written
        record = json.loads(written)
        assert record["labels"] == CODEBOOK
        assert record["parameters"]["seed"] == 4
        assert record["input_sha256"] == hashlib.sha256(bench.input.read_bytes()).hexdigest()
        assert record["rows"]["table"] == record["rows"]["labelled"] == 30
        assert set(record["versions"]) == {"enrich_dataset", "python", "openai", "pandas"}
        (served,) = record["served"]
        assert {name: served[name] for name in ("answers", "model", "system_fingerprint")} == {
            "answers": 30, "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_stand_in",
        }  # fmt: skip
        assert record["this_run"]["started_at"][:10] <= served["first_at"][:10] <= served["last_at"][:10]
        (prompt,) = record["prompts"]
        assert "what praising_violence means" in prompt["system_message_without_examples"]
        assert prompt["response_format"] == bench.server.calls[0].body["response_format"]
        assert (prompt["answers"], prompt["examples"]) == (30, 1)
        assert record["this_run"]["calls"] == 8
        assert record["this_run"]["dollars"] > 0
        assert record["all_runs_on_this_store"]["calls"] == 8
        assert record["counts"][LABELS[0]]["ones"] + record["counts"][LABELS[0]]["zeros"] == 30
        assert record["blank_rows"] == []
        assert record["audit"][LABELS[0]]["rows"] == 5

    def test_numpys_strings_are_strings_in_it(self, bench: Bench) -> None:
        import numpy as np

        bench.write(["cake"]).enrich(model=np.str_("gpt-4o-mini"))
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["parameters"]["model"] == "gpt-4o-mini"

    def test_blank_rows_stand_in_it_with_their_reasons(self, bench: Bench) -> None:
        bench.write(["cake", "poison-refusal", ""]).enrich()
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["blank_rows"] == [{"row": 1, "line": 3, "reason": "the model refused to answer"}]
        assert record["counts"][LABELS[0]] == {"ones": 0, "zeros": 1, "blank": 2}
        assert record["this_run"]["retries"] == 1

    def test_it_names_every_prompt_that_was_asked_of_these_labels_with_its_answers(self, bench: Bench) -> None:
        bench.write(make_texts(30)).enrich(LABELS[:2], limit=20)
        bench.enrich(LABELS)
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        prompts = {tuple(prompt["labels"]): prompt for prompt in record["prompts"]}
        assert {labels: prompt["answers"] for labels, prompt in prompts.items()} == {
            tuple(LABELS[:2]): 20, (LABELS[2],): 20, tuple(LABELS): 10,
        }  # fmt: skip
        sent = {call.body["messages"][0]["content"] for call in bench.server.calls}
        assert {prompt["system_message_without_examples"] for prompt in prompts.values()} == sent
        bench.enrich(LABELS[:2])
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert [prompt["labels"] for prompt in record["prompts"]] == [LABELS[:2], LABELS]
        assert record["served"][0]["answers"] == 30

    def test_it_has_the_parameters_that_were_really_sent_and_the_models_that_answered(self, bench: Bench) -> None:
        bench.write(make_texts(40)).enrich(limit=10)
        bench.server.gate.refuses = {"temperature"}
        completion = {"choices": [{"message": {"content": '{"660": []}'}}], "model": "gpt-4o-mini-2026-12-01"}
        bench.server.script.extend([None] * 4 + [(200, {}, completion)])
        bench.enrich(limit=30, quiet=False, max_workers=1, batch_size=1)
        bench.enrich(use_batch_api=True, poll_interval=0.05)
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert [(part["answers"], part.get("temperature"), part["tier"]) for part in record["sent_with"]] == [
            (10, 0.0, "standard"), (20, None, "standard"), (10, None, "batch"),
        ]  # fmt: skip
        assert {part["format"] for part in record["sent_with"]} == {"a strict schema"}
        assert {part["model"]: part["answers"] for part in record["served"]} == {
            "gpt-4o-mini-2024-07-18": 39, "gpt-4o-mini-2026-12-01": 1,
        }  # fmt: skip

    def test_it_tells_the_requested_rows_from_those_of_the_table_and_hashes_what_was_read(self, bench: Bench) -> None:
        gold = bench.input.with_name("gold.csv")
        gold.write_text(f"text,{LABELS[0]}\ncake,1\n")
        bench.write(["cake", "", "tram", "holiday"]).enrich(limit=2, gold=gold)
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert record["rows"] == {"table": 4, "requested": 2, "without_text": 1, "from_examples": 0, "labelled": 1}
        assert record["counts"][LABELS[0]]["blank"] == 1
        assert record["counts_of_the_whole_table"][LABELS[0]]["blank"] == 3
        assert record["gold_sha256"] == hashlib.sha256(gold.read_bytes()).hexdigest()

    def test_two_runs_alike_write_the_same_but_for_times_and_calls(self, bench: Bench) -> None:
        records = []
        bench.write(make_texts(10))
        for _ in range(2):
            bench.enrich()
            records.append(json.loads(Path(f"{bench.output}.run.json").read_text()))
            records[-1].pop("this_run")
        assert records[0] == records[1]


class TestPlot:
    def frame(self, labels: int, rows: int = 300) -> tuple[pd.DataFrame, list[str]]:
        dice = np.random.default_rng(1)
        names = [f"a_label_whose_name_is_forty_long_no_{place:04}"[:40] for place in range(labels)]
        frame = pd.DataFrame((dice.random((rows, labels)) < dice.random(labels) / 2).astype(int), columns=names)
        return frame.assign(label=dice.choice(["hate", "nothate"], rows)), names

    @pytest.mark.parametrize("count", [1, 10, 25])
    def test_every_name_can_be_read(self, count: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        frame, names = self.frame(count)
        figure = module.plot_labels(frame, names, by="label")
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        shares, together = figure.axes[:2]
        width, height = figure.canvas.get_width_height()
        for texts in (shares.get_yticklabels(), together.get_xticklabels()):
            boxes = [text.get_window_extent(renderer) for text in texts]
            assert [text.get_text() for text in texts] == names
            for box, other in itertools.pairwise(boxes):
                assert not box.overlaps(other)
            assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)

    def test_blanks_and_labels_that_never_apply_are_drawn(self) -> None:
        frame = pd.DataFrame({"a": pd.array([None, None], dtype="Int8"), "b": pd.array([0, 0], dtype="Int8")})
        assert module.plot_labels(frame, ["a", "b"])

    def test_the_command_writes_it(self, bench: Bench) -> None:
        path = bench.output.with_suffix(".png")
        assert bench.write(make_texts(30)).command("--plot", str(path), "--label-column", "id") == 0
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_a_kind_of_picture_that_cannot_be_drawn_is_refused_before_anything_is_sent(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bench.write(["cake"]).command("--plot", str(bench.output.with_suffix(".nonsense"))) == 2
        assert "out.nonsense must end in a kind of picture that can be drawn: ." in capsys.readouterr().err
        assert bench.server.calls == []

    def test_where_it_cannot_go_is_told_before_anything_is_sent(self, bench: Bench) -> None:
        with pytest.raises(module.InputError, match=r"There is no folder .* for the plot"):
            bench.write(["cake"]).enrich(plot=bench.output.parent / "nowhere" / "plot.png")
        assert bench.server.calls == []

    def test_without_matplotlib_it_says_what_to_install(self, tmp_path: Path) -> None:
        (tmp_path / "matplotlib.py").write_text("raise ImportError")
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport enrich_dataset, pandas\n"
        code += "enrich_dataset.plot_labels(pandas.DataFrame({'a': [1]}), ['a'])"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "A plot needs matplotlib: pip install matplotlib." in run.stderr
