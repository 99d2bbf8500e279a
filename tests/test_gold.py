"""Gold: what people coded, one or several of them, and the model's labels compared with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
import pytest
from conftest import (
    LABELS,
    Bench,
    code_sample,
    make_texts,
    read_sample,
    run_figures,
    sample_of,
    truth,
    write_examples,
    write_sample,
)

import enrich_dataset as module


def random_codes(seed: int, coders: int = 3, texts: int = 80, blank: float = 0.2) -> Any:
    dice = np.random.default_rng(seed)
    right = dice.random(texts) < dice.uniform(0.05, 0.6)
    codes = np.where(dice.random((coders, texts)) < 0.85, right, ~right).astype(np.int8)
    codes[dice.random((coders, texts)) < blank] = module.BLANK
    return codes


class TestAlpha:
    def test_it_is_the_package_krippendorffs_to_1e_12_on_100_random_tables(self) -> None:
        for seed in range(100):
            codes = random_codes(seed, coders=2 + seed % 4)
            ours = module.krippendorff_alpha(codes, np.ones(codes.shape[1]), 0)
            theirs = krippendorff.alpha(np.where(codes < 0, np.nan, codes), level_of_measurement="nominal")
            assert ours.value == pytest.approx(theirs, abs=1e-12)
            assert ours.low <= ours.value <= ours.high

    def test_a_weight_is_as_good_as_a_repetition_and_its_scale_does_not_matter(self) -> None:
        codes = random_codes(1, blank=0.0)
        weights = np.random.default_rng(2).integers(1, 4, codes.shape[1]).astype(float)
        repeated = np.repeat(codes, weights.astype(int), axis=1)
        once = module.krippendorff_alpha(codes, weights, 0).value
        assert once == pytest.approx(module.krippendorff_alpha(codes, 7 * weights, 0).value, abs=1e-12)
        assert once == pytest.approx(
            module.krippendorff_alpha(repeated, np.ones(repeated.shape[1]), 0).value, abs=0.005
        )

    def test_its_interval_covers(self) -> None:
        large = random_codes(5, texts=200_000, blank=0.0)
        true = module.krippendorff_alpha(large[:, :50_000], np.ones(50_000), 0).value
        intervals = [
            module.krippendorff_alpha(large[:, start : start + 150], np.ones(150), 0) for start in range(0, 15_000, 150)
        ]
        assert 0.88 <= np.mean([each.low <= true <= each.high for each in intervals]) <= 0.99

    @pytest.mark.parametrize("codes", [[[1, 1, 1], [1, 1, 1]], [[1, 0, -1], [-1, -1, 1]], [[], []]])
    def test_without_both_values_or_pairs_it_is_not_defined(self, codes: list[list[int]]) -> None:
        table = np.array(codes, np.int8).reshape(2, -1)
        assert np.isnan(module.krippendorff_alpha(table, np.ones(table.shape[1]), 0)).all()

    def test_a_value_that_is_too_rare_has_no_interval(self) -> None:
        codes = np.zeros((2, 40), np.int8)
        codes[:, 0] = 1
        told = module.krippendorff_alpha(codes, np.ones(40), 0)
        assert told.value == 1
        assert np.isnan(told.low)


def others(text: str) -> list[str]:
    """Who disagrees about the first label where a text has an even number of characters."""
    first, *rest = truth(text)
    return [str(1 - int(first)) if len(text) % 2 == 0 else first, *rest]


def copies(bench: Bench, count: int = 40) -> list[Path]:
    """Three people's copies of a sample, each of whom has left out some rows."""
    bench.write(make_texts(300)).enrich(sample=count)
    paths = [bench.output.with_name(f"{name}.csv") for name in ("ann", "ben", "cem")]
    for path, rule in zip(paths, (truth, others, others), strict=True):
        shutil.copy(sample_of(bench), path)
        code_sample(path, rule=rule)
    rows = read_sample(paths[2])
    for row in rows[: count // 2]:
        row |= dict.fromkeys(LABELS, "")
    write_sample(paths[2], rows)
    return paths


class TestCoders:
    def test_agreement_majority_and_ties(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        paths = copies(bench)
        assert bench.command("--coders", *map(str, paths)) == 0
        printed = capsys.readouterr().out
        assert "=== Agreement of the coders (Krippendorff's alpha), with 95 % intervals ===\n" in printed
        told = json.loads(Path(f"{bench.output}.run.json").read_text())
        codes = [[truth(row["text"])[0], others(row["text"])[0]] for row in read_sample(paths[0])]
        ties = sum(mine != theirs for mine, theirs in codes[:20])
        assert told["cells_not_settled"] == ties > 2
        assert (
            f"✗ Cells on which coders are tied: {ties}. They are left out of what follows, and are the hard ones: settle"
            in printed
        )
        assert f"; ties were left out ({ties} for praising_violence)." in Path(f"{bench.output}.methods.md").read_text()
        first = told["coders"][LABELS[0]]
        assert first["texts"] == 40
        assert 0 < first["agreement"] < 1
        assert first["alpha_low"] < first["alpha"] < first["alpha_high"]
        assert told["coders"][LABELS[1]]["agreement"] == 1
        assert told["draw"]["coded"][LABELS[0]] == 40 - ties
        assert {"coder_1_sha256", "coder_2_sha256", "coder_3_sha256"} <= set(told)
        listed = read_sample(Path(f"{bench.output}.disagreements.csv"))
        disputed = {row["people"] for row in listed if " " in row["people"]}
        assert disputed <= {"1 0 -", "0 1 -", "1 0 0", "0 1 1"}
        assert len(disputed) > 1

    def test_the_adjudicated_copy_decides_and_is_no_coder(self, bench: Bench) -> None:
        paths = copies(bench)
        final = bench.output.with_name("final.csv")
        shutil.copy(sample_of(bench), final)
        code_sample(final, count=30)
        alone = bench.enrich(coders=paths).attrs["enrichment"]
        told = bench.enrich(coders=paths, gold=final).attrs["enrichment"]
        assert {label: each["alpha"] for label, each in told["coders"].items()} == {
            label: each["alpha"] for label, each in alone["coders"].items()
        }
        assert (
            "a file in which differences were settled [author: by whom"
            in Path(f"{bench.output}.methods.md").read_text()
        )
        assert told["cells_not_settled"] == 0
        rows = read_sample(final)
        ones = sum(truth(row["text"])[0] == "1" for row in rows[:30])
        ones += sum(others(row["text"])[0] == "1" for row in rows[30:])
        assert told["draw"]["coded"][LABELS[0]] == 40
        assert told["gold_unmatched"] == {"not in the table": 0, "not coded": 0, "not labelled": 0}

    def test_gold_tables_that_were_not_drawn_are_joined_by_their_key(self, bench: Bench) -> None:
        bench.input.write_text("id,text\n1,cake\n2,violence\n3,attack\n4,tram\n")
        one = pd.DataFrame({"id": ["1", "2", "3"], LABELS[0]: [0, 1, 1]})
        two = pd.DataFrame({"id": ["2", "3", "4"], LABELS[0]: [1, 0, 0]})
        told = bench.enrich(coders=[one, two], gold_key="id").attrs["enrichment"]
        assert told["coders"][LABELS[0]]["texts"] == 2
        assert told["coders"][LABELS[0]]["agreement"] == 0.5
        assert told["gold"][LABELS[0]]["rows"] == 3
        assert told["cells_not_settled"] == 1

    def test_coders_with_identical_files_are_pointed_out(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = copies(bench)
        shutil.copy(paths[0], paths[1])
        bench.command("--coders", *map(str, paths))
        assert (
            "✗ Files with the same content as another coder's, whose agreement says nothing: 1\n"
            in capsys.readouterr().out
        )

    def test_what_cannot_be_joined_is_refused_before_anything_is_sent(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = copies(bench)
        calls = len(bench.server.calls)

        def refused(words: str, *arguments: str) -> None:
            assert bench.command("--fresh", *arguments) == 2
            errors = capsys.readouterr().err
            assert words in errors
            assert errors.count("\n") == 1

        refused("--coders needs at least two different files", "--coders", str(paths[0]))
        refused("--coders needs at least two different files", "--coders", str(paths[0]), str(paths[0]))
        refused("There is no file", "--coders", str(paths[0]), "gone.csv")
        rows = read_sample(paths[0])
        write_sample(paths[0], rows[:20])
        write_sample(paths[1], rows[20:])
        refused("No text was coded by two of the --coders", "--coders", str(paths[0]), str(paths[1]))
        bench.output.with_name("plain.csv").write_text(f"text,{LABELS[0]}\ncake,1\n")
        plain = str(bench.output.with_name("plain.csv"))
        refused("are of different draws: pass copies of one sample", "--coders", str(paths[0]), plain)
        shutil.copy(sample_of(bench), paths[1])
        refused("No 1 or 0 is filled in in the sample that is passed as --coders", "--coders", *map(str, paths[:2]))
        assert len(bench.server.calls) == calls


def test_gold_keys_of_which_none_fits_are_shown_beside_the_tables(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.input.write_text("id,text\n001,cake\n002,tram\n")
    gold = bench.output.with_name("gold.csv")
    gold.write_text(f"id,{LABELS[0]}\n1,1\n2,0\n")
    assert bench.command("--gold", str(gold), "--gold-key", "id") == 2
    assert "they have '1' and the like, it has '001' (spreadsheets drop zeros" in capsys.readouterr().err
    assert not bench.server.calls


def random_tables() -> list[tuple[pd.DataFrame, pd.DataFrame, list[str]]]:
    dice = np.random.default_rng(7)
    tables = []
    for number in range(100):
        rows, labels = int(dice.integers(1, 40)), [f"l{place}" for place in range(int(dice.integers(1, 5)))]
        share = (0.0, 0.5, 1.0, 0.1)[number % 4]  # no positives, some, all
        people, model = (
            pd.DataFrame((dice.random((rows, len(labels))) < p).astype(int), columns=labels)
            for p in (share, dice.random())
        )
        tables.append((model, people, labels))
    return tables


class TestGold:
    def test_the_figures_are_scikit_learns_to_1e_12_on_100_random_tables(self) -> None:
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
        told = run_figures(bench.write(["violence", "poison-refusal"]).enrich(gold=gold))
        assert told["gold_unmatched"] == {"not in the table": 1, "not labelled": 1, "not coded": 0}
        assert told["gold"][LABELS[0]]["rows"] == 1

    def test_a_key_column_tells_equal_texts_apart(self, bench: Bench) -> None:
        gold = pd.DataFrame({"id": [2, 0], LABELS[0]: [1, 1]})
        told = run_figures(bench.write(["violence", "praise", "cake"]).enrich(gold=gold, gold_key="id"))["gold"]
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
        told = run_figures(bench.write(["violence", "cake"]).enrich(gold=path))
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
            "row,line,id,label,model,people", "0,2,0,praising_violence,1,0", "0,2,0,personal_attacks,0,1",
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


class TestRegression:
    def test_the_coded_table_makes_a_slope_that_raw_labels_miss_cover_the_truth(self, bench: Bench) -> None:
        """By the README's own lines; the model misses the label in one of two groups."""
        import statsmodels.formula.api as smf  # noqa: F401 # which the lines import

        readme = (Path(__file__).parent.parent / "ENRICHMENT_README.md").read_text(encoding="utf-8")
        lines = readme.partition("```python\nimport pandas as pd\nimport statsmodels")[2].partition("```")[0]
        texts = [
            f"{text} {'from here' if number % 2 else 'from there'}" for number, text in enumerate(make_texts(1500))
        ]
        rows = {"source": ["here" if "from here" in text else "there" for text in texts], "text": texts}
        pd.DataFrame(rows).to_csv(bench.input, index=False)
        path = sample_of(bench)
        bench.enrich(sample=400, by="source")
        code_sample(path)
        bench.enrich(gold=path, by="source")
        names: dict[str, Any] = {}
        code_lines = ("import pandas as pd\nimport statsmodels" + lines).replace("labelled.csv", str(bench.output))
        exec(code_lines.replace("hateful", LABELS[0]), names)  # noqa: S102 # our own README
        right = pd.Series([int(truth(text)[0]) for text in texts]).groupby(rows["source"]).mean()
        told = bench.enrich(gold=path, by="source").attrs["enrichment"]["corrected_shares"][LABELS[0]]
        assert names["rows"]["y"].mean() == pytest.approx(told["corrected_share"], abs=1e-9)
        low, high = names["fit"].conf_int().loc["C(source)[T.there]"]
        assert low <= right["there"] - right["here"] <= high
        assert high - low < 0.25
