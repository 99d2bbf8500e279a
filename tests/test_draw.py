"""Draw: samples with known probabilities, and shares corrected by what people coded in them."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import LABELS, Bench, code_sample, keys_of, make_texts, read_sample, sample_of, truth, write_sample
from hypothesis import given
from hypothesis import strategies as st
from simulate_shares import SETTINGS, misses, simulate

import enrich_dataset as module


def labelled(count: int = 5000, seed: int = 1) -> Any:
    dice = np.random.default_rng(seed)
    return (dice.random((count, 3)) < [0.3, 0.05, 0.01]).astype(np.int8)


def sizes_of(predicted: Any) -> Any:
    return module.sampling_sizes(predicted, np.ones((len(predicted), 1), int))


class TestDrawing:
    def test_enlarging_a_sample_keeps_its_texts(self) -> None:
        sizes = sizes_of(labelled())
        for seed in range(60):
            small, _ = module.draw_sample(keys_of(5000), sizes, 300, seed)
            large, _ = module.draw_sample(keys_of(5000), sizes, 500, seed)
            assert len(set(small)) == 300
            assert len(set(large)) == 500
            assert set(small) <= set(large)

    def test_texts_are_drawn_as_often_as_is_stated(self) -> None:
        sizes, draws = sizes_of(labelled(600)), 600
        counts = np.zeros(600)
        for seed in range(draws):
            drawn, probabilities = module.draw_sample(keys_of(600), sizes, 100, seed)
            counts[drawn] += 1
        error = np.sqrt(np.maximum(probabilities * (1 - probabilities), 1e-9) / draws)
        assert np.abs(counts / draws - probabilities).mean() < 1.2 * np.sqrt(2 / np.pi) * error.mean()
        assert (np.abs(counts / draws - probabilities) < 5 * error + 0.01).all()
        assert probabilities.sum() == pytest.approx(100)

    def test_a_group_gets_a_part_in_proportion_to_the_root_of_its_rows(self) -> None:
        predicted = np.zeros((1000, 3), np.int8)
        predicted[:100, 0], predicted[100:125, 1], predicted[125:129, 2] = 1, 1, 1
        predicted[900:, :] = module.BLANK
        counts = np.ones((1000, 1), int)
        counts[124] = 12
        sizes = module.sampling_sizes(predicted, counts)
        groups = [slice(0, 100), slice(100, 125), slice(125, 129), slice(129, 900), slice(900, 1000)]
        rows = np.array([100, 36, 4, 771, 100])
        np.testing.assert_allclose([sizes[group].sum() for group in groups], np.sqrt(rows))
        assert sizes[124] == pytest.approx(12 * sizes[123])

    def test_each_value_of_another_column_is_a_group_too(self) -> None:
        predicted, counts = np.zeros((100, 1), np.int8), np.zeros((100, 2), int)
        counts[:96, 0], counts[96:, 1] = 1, 1
        sizes = module.sampling_sizes(predicted, counts)
        assert sizes[96:].sum() == pytest.approx(2)
        assert sizes[:96].sum() == pytest.approx(96**0.5)

    def test_another_seed_draws_other_texts_and_the_same_seed_the_same(self, bench: Bench) -> None:
        drawn = {}
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            bench.output = bench.input.with_name(f"{name}.csv")
            bench.write(make_texts(200)).enrich(sample=20, seed=seed, store_filepath=bench.input.with_name("answers"))
            drawn[name] = {row["text"] for row in read_sample(sample_of(bench))}
        assert drawn["a"] == drawn["b"]
        assert len(drawn["a"] & drawn["c"]) < 15

    def test_the_six_most_frequent_values_of_a_column_are_groups(self) -> None:
        frame = pd.DataFrame(
            {"text": [f"text {n}" for n in range(45)], "by": [v for v in range(9) for _ in range(9 - v)]}
        )
        table = module.read_table(frame, module.Columns("text", (), (), "by"))
        population = module.find_population(table, np.ones(45, bool))
        assert population.values == ["0", "1", "2", "3", "4", "5"]

    def test_a_part_from_the_top_is_a_random_part(self) -> None:
        predicted = labelled()
        sizes, tops, wholes = sizes_of(predicted), [], []
        for seed in range(100):
            drawn, _ = module.draw_sample(keys_of(5000), sizes, 300, seed)
            tops.append(predicted[drawn[:100]].mean(axis=0))
            wholes.append(predicted[drawn].mean(axis=0))
        np.testing.assert_allclose(np.mean(tops, axis=0), np.mean(wholes, axis=0), atol=0.015)

    @pytest.mark.parametrize("count", [1, 5, 10, 20])
    def test_small_populations_are_drawn_whole(self, count: int) -> None:
        drawn, probabilities = module.draw_sample(keys_of(10), sizes_of(np.zeros((10, 2), np.int8)), count, 0)
        assert len(drawn) == min(count, 10)
        assert probabilities.sum() == pytest.approx(min(count, 10))

    @given(st.binary(min_size=16, max_size=16), st.floats(1e-6, 1), st.integers(0, 2**32 - 1), st.integers(1, 64))
    def test_an_id_holds_what_the_correction_needs_and_an_edited_one_is_noticed(
        self, key: bytes, chance: float, texts: int, edited: int
    ) -> None:
        name = module.sample_id(key, chance, (texts, 7))
        assert re.fullmatch("t[0-9a-f]{64}", name)
        assert module.read_sample_id(name) == (key, pytest.approx(chance, rel=1e-6), texts, 7)
        other = "0" if name[edited] != "0" else "1"
        wrong = name[:edited] + other + name[edited + 1 :]
        with pytest.raises(ValueError, match="sample_id"):
            module.read_sample_id(wrong)

    def test_neither_order_nor_ids_tell_what_the_model_said_over_200_seeds(self) -> None:
        """Correlations of the model's labels with a text's place in the file and with each digit of its id."""
        predicted = labelled(2000)
        sizes, found = sizes_of(predicted), []
        for seed in range(200):
            keys = [module.digest(seed, number) for number in range(2000)]  # other texts each time
            drawn, chances = module.draw_sample(keys, sizes, 200, seed)
            names = [module.sample_id(keys[index], chances[index], (2000, 7)) for index in drawn]
            shown = np.array([[place, *(int(digit, 16) for digit in name[1:])] for place, name in enumerate(names)])
            said = predicted[drawn].any(axis=1)
            found.append([np.corrcoef(column, said)[0, 1] for column in shown.T])
        mean = np.mean(found, axis=0)
        assert np.abs(mean).max() < 4 / np.sqrt(200 * 200)  # of 65 columns, none


class TestShares:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_corrected_shares_are_unbiased_narrow_and_cover(self, name: str) -> None:
        """A small version of tests/simulate_shares.py, with wider limits: of so many intervals one may fail by two."""
        draws, setting = 60, SETTINGS[name]
        figures = simulate(setting, draws)
        assert len(misses(setting, figures, draws)) <= 1
        if setting.precision < 0.8:
            assert (abs(figures["raw"] - figures["true"]) > 0.1 * figures["true"]).all()

    def test_a_method_that_ignores_what_was_coded_is_noticed(self) -> None:
        setting = SETTINGS["recall 0.3, precision 0.2"]
        figures = simulate(setting, 40).assign(covers=0.5, corrected=0.5)
        assert len(misses(setting, figures, 40)) >= 10
        assert misses(setting, simulate(setting, 40).assign(covers=1.0, relative_width=3.0), 40)

    def test_intervals_cover_where_a_few_texts_fill_many_rows(self) -> None:
        """Twenty texts of 500 rows each, none of them true, which are all drawn, and 5,000 of one row."""
        dice = np.random.default_rng(1)
        counts = np.r_[np.full(20, 500), np.ones(4980, int)]
        truth = np.r_[np.zeros(20, bool), dice.random(4980) < 0.15]
        model = np.where(truth, dice.random(5000) < 0.6, dice.random(5000) < 0.03).astype(np.int8)
        model[:20] = 0
        keys, sizes = keys_of(5000), module.sampling_sizes(model[:, None], counts[:, None])
        true, found = np.average(truth, weights=counts), []
        for seed in range(100):
            drawn, chances = module.draw_sample(keys, sizes, 300, seed)
            row = module.corrected_shares(
                pd.DataFrame({"a": model}), pd.DataFrame({"a": truth[drawn].astype(int)}, drawn), ["a"],
                pd.Series(chances[drawn], drawn), pd.Series(counts),
            ).loc["a"]  # fmt: skip
            found.append((row["corrected_share"], row["corrected_share_low"] <= true <= row["corrected_share_high"]))
        values, covers = map(np.array, zip(*found, strict=True))
        assert values.mean() == pytest.approx(true, abs=3 * values.std() / 10)
        assert covers.mean() >= 0.9

    def test_with_a_census_the_corrected_share_is_the_true_share_and_has_no_interval(self) -> None:
        dice = np.random.default_rng(3)
        people = pd.DataFrame((dice.random((400, 2)) < [0.3, 0.04]).astype(int), columns=["a", "b"])
        model = people.where(dice.random((400, 2)) < 0.9, 1 - people)
        counts = pd.Series(dice.integers(1, 5, 400))
        table = module.corrected_shares(model, people, ["a", "b"], pd.Series(1.0, index=people.index), counts)
        for label in ("a", "b"):
            right = pytest.approx(np.average(people[label], weights=counts), abs=1e-12)
            assert [table.loc[label, f"corrected_share{end}"] for end in ("", "_low", "_high")] == [right] * 3
        once = module.corrected_shares(model, people, ["a", "b"], pd.Series(1.0, index=people.index))
        told = module.evaluate_labels(model, people, ["a", "b"]).loc[["a", "b"]]
        for name in ("precision", "recall", "f1", "kappa"):
            np.testing.assert_allclose(once[name].astype(float), told[name].astype(float), rtol=0, atol=1e-12)

    def test_texts_that_were_not_coded_widen_the_interval_of_a_census(self) -> None:
        people = pd.DataFrame({"a": [1, 0] * 50})
        half = pd.DataFrame({"a": [None] * 50 + [1, 0] * 25}).astype("Int8")
        chances = pd.Series(1.0, index=people.index)
        table = module.corrected_shares(people, half, ["a"], chances)
        assert table.loc["a", "precision_low"] < 1
        missing = module.corrected_shares(people, people[:50], ["a"], chances, drawn=100)
        assert missing.loc["a", "precision_low"] == pytest.approx(table.loc["a", "precision_low"])

    def test_texts_without_an_answer_count_by_what_was_coded_of_them(self) -> None:
        model = pd.DataFrame({"a": [1] * 10 + [0] * 80 + [None] * 10}).astype("Int8")
        people = pd.DataFrame({"a": [1] * 10 + [0] * 80 + [1] * 8 + [0] * 2})
        chances = pd.Series(1.0, index=people.index)
        assert module.corrected_shares(model, people, ["a"], chances).loc["a", "corrected_share"] == pytest.approx(0.18)
        assert module.corrected_shares(model, people, ["a"], chances).loc["a", "raw_share"] == pytest.approx(1 / 9)
        unknown = module.corrected_shares(model, people[:90], ["a"], chances[:90]).loc["a"]
        assert unknown["corrected_share"] == pytest.approx(1 / 9)
        assert unknown["corrected_share_low"] == pytest.approx(0.1, abs=0.001)
        assert unknown["corrected_share_high"] == pytest.approx(0.2, abs=0.001)

    def test_anscombes_interval_of_known_cases(self) -> None:
        assert module.arcsine(0.3, 100) == pytest.approx((0.3, 0.2161, 0.3944), abs=1e-4)
        assert module.arcsine(0.0, 30) == pytest.approx((0.0, 0.0, 1 - 0.05 ** (1 / 30)), abs=0.02)
        assert module.arcsine(1.0, 30)[2] == 1
        assert module.arcsine(0.0, 1000)[2] >= 1 - 0.05 ** (1 / 1000)

    def test_a_group_of_which_nobody_was_coded_gives_no_figure(self) -> None:
        model = pd.DataFrame({"a": [1, 1, 0, 0, 0]})
        gold = pd.DataFrame({"a": [0.0, 1.0]}, index=[2, 3])
        table = module.corrected_shares(model, gold, ["a"], pd.Series(0.5, index=[2, 3]))
        assert table.loc["a", "coded"] == 2
        assert table.loc["a", ["corrected_share", "corrected_share_low", "precision", "recall"]].isna().all()
        assert table.loc["a", "raw_share"] == 0.4

    def test_a_label_that_was_never_predicted_is_corrected_by_what_was_missed(self) -> None:
        model = pd.DataFrame({"a": [0] * 100})
        gold = pd.DataFrame({"a": [1] * 5 + [0] * 45})
        table = module.corrected_shares(model, gold, ["a"], pd.Series(0.5, index=gold.index))
        assert table.loc["a", "corrected_share"] == pytest.approx(0.1)
        assert table.loc["a", "corrected_share_low"] < 0.1 < table.loc["a", "corrected_share_high"]
        assert table.loc["a", "recall"] == 0
        assert np.isnan(table.loc["a", "precision"])

    def test_a_blank_counts_as_not_coded_and_a_text_of_another_table_is_refused(self) -> None:
        model, gold = pd.DataFrame({"a": [1, 0]}), pd.DataFrame({"a": [1.0, None]})
        assert module.corrected_shares(model, gold, ["a"], pd.Series([1.0, 1.0])).loc["a", "coded"] == 1
        with pytest.raises(module.InputError, match=r"must be one of `predicted`"):
            module.corrected_shares(model, gold.set_axis([0, 7]), ["a"], pd.Series(1.0, index=[0, 7]))

    def test_differences_of_groups_are_newcombes(self) -> None:
        """His example (1998): 56/70 and 48/80, method 10: 0.0524 to 0.3339; Wilson's limits stand in for ours."""

        def shares(ones: int, rows: int) -> pd.DataFrame:
            low, high = module.wilson(ones, rows)
            told = {"corrected_share": ones / rows, "corrected_share_low": low, "corrected_share_high": high}
            return pd.DataFrame([told], index=["a"])

        table = module.corrected_differences({"here": shares(48, 80), "there": shares(56, 70)})
        assert table.loc[("a", "there")].tolist() == pytest.approx([0.2, 0.0524, 0.3339], abs=1e-4)

    def test_intervals_are_statsmodels_to_1e_12_on_random_tables(self) -> None:
        from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

        def shares(ones: int, rows: int) -> pd.DataFrame:
            low, high = module.wilson(ones, rows)
            told = {"corrected_share": ones / rows, "corrected_share_low": low, "corrected_share_high": high}
            return pd.DataFrame([told], index=["a"])

        dice = np.random.default_rng(5)
        for _ in range(200):
            (n1, n2), chance = dice.integers(5, 400, 2), dice.random()
            x1, x2 = dice.binomial([n1, n2], chance)
            assert module.wilson(x1, n1) == pytest.approx(proportion_confint(x1, n1, method="wilson"), abs=1e-12)
            told = module.corrected_differences({"here": shares(x2, n2), "there": shares(x1, n1)}).loc[("a", "there")]
            right = confint_proportions_2indep(x1, n1, x2, n2, method="newcomb")
            assert [told["low"], told["high"]] == pytest.approx(right, abs=1e-12)

    def test_the_width_that_is_told_comes_true(self) -> None:
        setting = SETTINGS["recall 0.8, precision 0.8"]
        from simulate_shares import population

        _, model, _ = population(setting)
        sizes, rows = module.sampling_sizes(model, np.ones((len(model), 1), int)), np.ones(len(model), int)
        chances = module.inclusion_probabilities(sizes, 300)
        measured = simulate(setting, 40)["width"]
        for column, label in enumerate(setting.shares):
            told = module.expected_width(model[:, column], rows, chances, 0.8, 0.8)
            assert told == pytest.approx(measured[label], rel=0.12)


class TestSamples:
    def test_sample_code_compare_and_enlarge(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = sample_of(bench)
        bench.write([*make_texts(1000), *make_texts(50)])
        assert bench.command("--sample", "60", "--label-column", "id") == 0
        assert f"✓ Sample: 60 of 1050 distinct texts, in {path}\n" in capsys.readouterr().out
        path.unlink()
        assert bench.command("--sample", "60") == 0
        printed = capsys.readouterr().out
        assert "✓ Sample: 60 of 1000 distinct texts" in printed
        assert (
            "  Width of the 95 % intervals to expect, in points from end to end, at the precision and recall assumed"
            in printed
        )
        assert re.search(
            r"precision +recall +60 coded +120 coded\n +praising_violence +0\.800 +0\.800 +\d+\.\d ", printed
        )
        rows = read_sample(path)
        assert list(rows[0]) == ["sample_id", "text", *LABELS]
        assert path.read_bytes().startswith(b"\xef\xbb\xbf")
        assert {row[label] for row in rows for label in LABELS} == {""}
        coded = code_sample(path, 50)
        calls = len(bench.server.calls)
        assert bench.command("--gold", str(path)) == 0
        printed = capsys.readouterr().out
        assert len(bench.server.calls) == calls
        assert "=== Shares, corrected by what people coded, with 95 % intervals ===\n" in printed
        table = printed.partition("=== Shares, corrected")[2].splitlines()
        assert table[1].split() == ["coded", "raw", "corrected"]
        assert table[2].split()[:2] == ["praising_violence", "50"]
        record = json.loads(Path(f"{bench.output}.run.json").read_text())
        right = np.mean([truth(text)[0] == "1" for text in bench.texts])
        told = record["corrected_shares"][LABELS[0]]
        assert told["corrected_share_low"] - 0.02 <= right <= told["corrected_share_high"] + 0.02  # one draw of many
        assert "gold" not in record
        draw = record["draw"]
        assert {name: draw[name] for name in ("texts", "rows", "drawn", "coded", "seed")} == {
            "texts": 1000, "rows": 1050, "drawn": 60, "coded": dict.fromkeys(LABELS, 50), "seed": 0,
        }  # fmt: skip
        assert draw["drawn_at"].startswith("20")
        assert "Ohlsson" in draw["design"]
        before = [row["sample_id"][:33] for row in read_sample(path)]
        assert bench.command("--sample", "100", "--gold", str(path)) == 0
        after = {row["sample_id"][:33]: [row[label] for label in LABELS] for row in read_sample(path)}
        assert len(after) == 100
        assert list(after)[:60] == before
        assert {name: cells for name, cells in after.items() if name in coded} == coded

    def test_a_sample_that_went_through_a_spreadsheet_is_understood(self, bench: Bench) -> None:
        path = sample_of(bench)
        bench.write([f"{text}; with ünï" for text in make_texts(300)]).enrich(sample=40)
        code_sample(path)
        direct = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        rows = read_sample(path)
        random.Random(1).shuffle(rows)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0].keys(), delimiter=";", lineterminator="\r\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {LABELS[0]: f"{row[LABELS[0]]},0"})
        path.write_bytes(text.getvalue().encode("cp1252"))
        told = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        assert told == {label: pytest.approx(figures, nan_ok=True) for label, figures in direct.items()}
        bench.enrich(sample=50)
        assert sum(row[LABELS[1]] != "" for row in read_sample(path)) == 40

    def test_semicolons_stay_semicolons(self, bench: Bench) -> None:
        bench.input.write_text("id;text\n1;cake\n2;violence\n")
        bench.enrich(sample=2)
        assert len(read_sample(sample_of(bench), ";")[0]) == 5

    def test_cells_that_were_given_and_blank_texts_are_no_part_of_it_and_rows_without_an_answer_are(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.input.write_text(f"text,{LABELS[0]}\nviolence,0\ntram,\ncake,\n,\npoison-refusal,\n")
        bench.enrich(sample=10, quiet=False, examples=pd.DataFrame([["cake", 0, 0, 0]], columns=["text", *LABELS]))
        printed = capsys.readouterr().out
        assert "✓ Sample: 2 of 2 distinct texts" in printed
        assert "Rows without an answer: 25.0%; the shares above leave them out\n" in printed
        assert {row["text"] for row in read_sample(sample_of(bench))} == {"tram", "poison-refusal"}

    HEAD = f"sample_id,{','.join(LABELS)}\n"
    ID, OTHER = module.sample_id(b"k" * 16, 0.5, (10, 7)), module.sample_id(b"l" * 16, 0.5, (11, 7))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (f"{HEAD}12,1,0,0\n", "Row 0 of the sample"),
            (f"{HEAD}t{'0' * 64},1,0,0\n", "Row 0 of the sample"),
            (f"{HEAD}{ID[:-1]},1,0,0\n", "Row 0 of the sample"),
            (f"{HEAD}{ID},maybe,0,0\n", "row 0 (line 2): the column 'praising_violence' holds 'maybe', not 1, 0"),
            (f"{HEAD}{ID},1,0,0\n{ID},1,0,0\n", "twice"),
            (f"{HEAD}{ID},1,0,0\n{OTHER},1,0,0\n", "rows of different draws"),
        ],
    )
    def test_one_that_cannot_be_understood_is_refused_and_left_alone(
        self, bench: Bench, content: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        path.write_text(content)
        for option in (("--sample", "5"), ("--gold", str(path))):
            assert bench.write(make_texts(10)).command(*option) == 2
            errors = capsys.readouterr().err
            assert words in errors
            assert errors.count("\n") == 1
        assert path.read_text() == content
        assert bench.server.calls == []

    def test_it_grows_from_a_pilot_into_the_whole_and_keeps_what_is_coded_notes_too(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(3000)).enrich(LABELS[:2], sample=80, limit=200)
        rows = [row | {LABELS[0]: "1", LABELS[1]: "0", "note": "sic"} for row in read_sample(path)]
        write_sample(path, rows)
        assert bench.command("--gold", str(path)) == 0
        printed = capsys.readouterr().out
        assert "✗ Shares are not corrected: the sample was drawn from 200 texts, and there are 3,000 now." in printed
        assert "Draw again with --sample, which keeps what is coded" in printed
        assert f"Labels without a gold column: {LABELS[2]}\n" in printed
        assert "corrected_shares" not in json.loads(Path(f"{bench.output}.run.json").read_text())
        assert bench.command("--sample", "150", "--seed", "5") == 0
        grown = read_sample(path)
        assert [row["sample_id"][:33] for row in grown[:80]] == [row["sample_id"][:33] for row in rows]
        assert {row["note"] for row in grown[:80]} == {"sic"}
        assert 150 <= len(grown) < 230
        assert list(grown[0]) == ["sample_id", "text", *LABELS, "note"]
        code_sample(path)
        assert bench.command("--gold", str(path)) == 0
        told = json.loads(Path(f"{bench.output}.run.json").read_text())
        assert told["draw"]["seed"] == 0
        for place, label in enumerate(LABELS):
            right = np.mean([truth(text)[place] == "1" for text in bench.texts])
            figures = told["corrected_shares"][label]
            assert figures["corrected_share_low"] - 0.02 <= right <= figures["corrected_share_high"] + 0.02

    def test_a_grown_samples_shares_are_unbiased(self) -> None:
        """A text's probability is the larger of its two: checked over many seeds."""
        dice = np.random.default_rng(2)
        truth = dice.random(2000) < 0.2
        model = np.where(dice.random(2000) < 0.85, truth, ~truth).astype(np.int8)[:, None]
        keys, ones = keys_of(2000), np.ones((2000, 1), int)
        found = []
        for seed in range(150):
            pilot, chances = module.draw_sample(keys[:500], module.sampling_sizes(model[:500], ones[:500]), 60, seed)
            drawn, whole = module.draw_sample(keys, module.sampling_sizes(model, ones), 150, seed)
            whole[pilot] = np.maximum(whole[pilot], chances[pilot])
            both = np.unique([*pilot, *drawn])
            shares = module.corrected_shares(
                pd.DataFrame(model, columns=["a"]), pd.DataFrame({"a": truth[both].astype(int)}, both), ["a"],
                pd.Series(whole[both], both),
            )  # fmt: skip
            found.append(shares.loc["a", "corrected_share"])
        assert np.mean(found) == pytest.approx(truth.mean(), abs=3 * np.std(found) / 150**0.5 + 0.002)

    @pytest.mark.parametrize("extra", [0, 15, 60])
    def test_a_sample_that_grew_by_groups_of_which_the_new_texts_are_coded_in_part_gives_unbiased_shares(
        self, extra: int
    ) -> None:
        """What is coded is all of the first draw and, of the second, so many from the top."""
        dice = np.random.default_rng(3)
        group = dice.random(2000) < 0.1
        truth = dice.random(2000) < np.where(group, 0.8, 0.05)
        model = (dice.random(2000) < np.where(truth, 0.6, 0.1)).astype(np.int8)[:, None]
        by, keys = np.stack([~group, group], axis=1).astype(int), keys_of(2000)
        found, covered, width = [], 0, []
        for seed in range(150):
            first, before = module.draw_sample(keys, module.sampling_sizes(model, np.ones((2000, 1), int)), 60, seed)
            second, chances = module.draw_sample(keys, module.sampling_sizes(model, by), 120, seed)
            chances[first] = np.maximum(chances[first], before[first])
            new = [place for place in second.tolist() if place not in set(first.tolist())]
            places = np.array([*first, *new])
            cells = truth[places].astype(np.int8)[:, None]
            cells[len(first) + extra :] = module.BLANK
            names = [f"t{keys[place].hex()}" for place in places]
            known = [
                dict(zip(names, map(float, chances[places]), strict=True)),
                {f"t{keys[place].hex()}": float(before[place]) for place in first},
            ]
            noted = {"draws": [{"identity": (2000, 7), "chances": each} for each in known]}
            draw = module.Draw(chances[places], 2000, 7)
            coded = module.coded_draw(module.Gold(cells, names, places, {}, [], [], draw), draw, noted, 0)
            row = module.corrected_shares(
                pd.DataFrame(model, columns=["a"]),
                pd.DataFrame(module.label_columns(coded.gold.cells, ["a"]), coded.gold.numbers), ["a"],
                pd.Series(coded.draw.probabilities, coded.gold.numbers),
                drawn=coded.in_all,
            ).loc["a"]  # fmt: skip
            found.append(row["corrected_share"])
            covered += row["corrected_share_low"] <= truth.mean() <= row["corrected_share_high"]
            width.append(row["corrected_share_high"] - row["corrected_share_low"])
        assert np.mean(found) == pytest.approx(truth.mean(), abs=3 * np.std(found) / 150**0.5 + 0.002)
        assert covered >= 135

    def test_a_sample_of_which_nothing_new_is_coded_gives_the_figures_of_before_it_grew(self, bench: Bench) -> None:
        path = sample_of(bench)
        texts = [f"{text}, {'here' if number % 9 else 'there'}" for number, text in enumerate(make_texts(300))]
        rows = {"text": texts, "place": ["here" if number % 9 else "there" for number in range(300)]}
        pd.DataFrame(rows).to_csv(bench.input, index=False)
        bench.enrich(sample=60)
        code_sample(path)
        before = bench.enrich(gold=path).attrs["enrichment"]
        grown = bench.enrich(gold=path, sample=120, by="place").attrs["enrichment"]
        again = bench.enrich(gold=path).attrs["enrichment"]
        assert len(read_sample(path)) == 120
        for told in (grown, again):
            assert told["corrected_shares"] == before["corrected_shares"]
        code_sample(path)
        whole = bench.enrich(gold=path).attrs["enrichment"]
        assert whole["corrected_shares"][LABELS[0]]["coded"] == 120
        assert whole["draw"]["drawn"] == 120

    def test_a_sample_does_not_grow_in_a_run_that_labels_only_a_part_of_its_texts(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(100)).enrich(sample=40)
        code_sample(sample_of(bench))
        before, calls = sample_of(bench).read_bytes(), len(bench.server.calls)
        assert bench.command("--limit", "50", "--sample", "45") == 2
        assert "texts that are in the table, but that this run does not label" in capsys.readouterr().err
        assert sample_of(bench).read_bytes() == before
        assert len(bench.server.calls) == calls

    def test_a_window_of_nearly_the_same_size_but_other_texts_is_not_taken_for_the_same(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(1200)).enrich(sample=100, limit=1000, batch_size=50)
        code_sample(sample_of(bench))
        assert "corrected_shares" in bench.enrich(gold=sample_of(bench), limit=1005).attrs["enrichment"]
        for start in (100, 150):
            told = bench.enrich(gold=sample_of(bench), start_index=start, limit=1005).attrs["enrichment"]
            assert "corrected_shares" not in told

    def test_rows_with_given_labels_are_told_to_be_left_out(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = make_texts(60)
        rows = {"text": texts, LABELS[0]: ["1" if number < 7 else "" for number in range(60)]}
        pd.DataFrame(rows).to_csv(bench.input, index=False)
        bench.enrich(sample=30)
        code_sample(sample_of(bench))
        bench.enrich(gold=sample_of(bench), quiet=False)
        assert "Rows with existing labels or of examples, which these shares leave out: 7\n" in capsys.readouterr().out

    def test_of_a_grown_sample_each_label_is_read_by_its_own_codes(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(300)).enrich(sample=60)
        code_sample(path)
        before = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        bench.enrich(sample=120)
        rows = read_sample(path)
        for row in rows[60:]:
            row[LABELS[1]] = truth(row["text"])[1]
        for row in rows[:60]:
            row[LABELS[2]] = ""
        for row in rows[60:]:
            row[LABELS[2]] = truth(row["text"])[2]
        write_sample(path, rows)
        told = bench.enrich(gold=path, quiet=False).attrs["enrichment"]
        assert told["corrected_shares"][LABELS[0]] == pytest.approx(before[LABELS[0]])
        assert told["corrected_shares"][LABELS[1]]["coded"] == 120
        assert LABELS[2] not in told["corrected_shares"]
        assert f"{LABELS[2]}: not corrected, since of the texts that were drawn first" in capsys.readouterr().out

    def test_a_grown_sample_of_which_only_new_texts_are_coded_corrects_nothing_and_says_why(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(200)).enrich(sample=40)
        bench.enrich(sample=80)
        rows = read_sample(path)
        code_sample(path)
        write_sample(path, rows[:40] + read_sample(path)[40:])
        told = bench.enrich(gold=path, quiet=False).attrs["enrichment"]
        assert "corrected_shares" not in told
        printed = capsys.readouterr().out
        assert printed.count("not corrected, since of the texts that were drawn first") == 3
        assert "which are others" not in printed
        assert "none was coded" in Path(f"{bench.output}.methods.md").read_text()

    def test_rows_deleted_from_a_grown_sample_still_count_as_drawn(self, bench: Bench) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=50)
        bench.enrich(sample=100)
        code_sample(path)
        whole = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"][LABELS[0]]
        assert whole["corrected_share_low"] == whole["corrected_share_high"]
        write_sample(path, read_sample(path)[::2])
        half = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"][LABELS[0]]
        assert half["corrected_share_high"] - half["corrected_share_low"] > 0.05

    def test_a_fresh_sample_has_other_texts_and_two_outputs_on_one_store_their_own_draws(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(make_texts(300)).enrich(sample=40)
        first = {row["text"] for row in read_sample(sample_of(bench))}
        sample_of(bench).rename(bench.output.with_name("first.csv"))
        assert bench.command("--sample", "40") == 0
        assert "A sample was drawn before and is not here: others are drawn, with seed 1" in capsys.readouterr().out
        second = {row["text"] for row in read_sample(sample_of(bench))}
        assert len(first & second) < 15
        store, bench.output = bench.store, bench.output.with_name("other.csv")
        bench.enrich(sample=40, seed=7, store_filepath=store)
        code_sample(sample_of(bench))
        told = bench.enrich(gold=sample_of(bench), store_filepath=store).attrs["enrichment"]
        assert told["draw"]["seed"] == 7

    def test_texts_that_have_left_the_table_are_dropped_and_counted(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=40)
        code_sample(path)
        assert bench.write(make_texts(100)[50:]).command("--sample", "40") == 0
        left = re.search(r"Left out, since these texts are no longer in the table: (\d+)", capsys.readouterr().out)
        assert left
        assert 5 < int(left[1]) < 35
        assert {row["text"] for row in read_sample(path)} <= set(bench.texts)

    def test_a_population_that_is_nearly_the_same_is_told_and_one_of_the_same_size_is_not_enough(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, texts = sample_of(bench), make_texts(400)
        bench.write(texts[:398]).enrich(sample=60)
        code_sample(path)
        assert bench.write(texts).command("--gold", str(path)) == 0
        printed = capsys.readouterr().out
        assert "The sample was drawn from 398 texts, and there are 400 now: nearly the same\n" in printed
        assert "=== Shares, corrected" in printed
        assert bench.write(texts[2:]).command("--gold", str(path)) == 0
        assert "drawn from 398 texts, and there are 398 now, which are others. Draw" in capsys.readouterr().out

    def test_what_nobody_has_coded_and_what_is_of_another_draw_is_told(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=20)
        assert bench.command("--gold", str(path)) == 2
        told = "No 1 or 0 is filled in in the sample that is passed as --gold: have people code some rows."
        assert told in capsys.readouterr().err
        code_sample(path)
        bench.enrich(sample=30)
        assert bench.command("--gold", str(path)) == 0
        assert "Gold rows that are not coded: 10\n" in capsys.readouterr().out
        assert bench.command("--gold", str(path), "--label-column", "id") == 2
        told = (
            f"No text of the sample {path} is in {bench.input}: pass the table from which it was drawn, with the same"
        )
        assert told in capsys.readouterr().err

    def test_copies_of_before_it_grew_are_read_by_what_is_known_now(self, bench: Bench) -> None:
        """Of one person, who has pasted the new rows under the old ones, and of one who has coded the new file."""
        path = sample_of(bench)
        bench.write(make_texts(400)).enrich(sample=60)
        code_sample(path)
        old = read_sample(path)
        bench.enrich(sample=120)
        code_sample(path)
        whole = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        pasted = bench.output.with_name("pasted.csv")
        write_sample(pasted, [*old, *read_sample(path)[60:]])
        assert bench.enrich(gold=pasted).attrs["enrichment"]["corrected_shares"] == whole

    def test_ids_that_stand_beside_other_texts_are_refused(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=20)
        code_sample(path)
        rows = read_sample(path)
        for row, name in zip(rows, sorted(row["sample_id"] for row in rows), strict=True):
            row["sample_id"] = name
        write_sample(path, rows)
        assert bench.command("--gold", str(path)) == 2
        assert "has the sample_id of another text: was one column sorted alone?" in capsys.readouterr().err

    def test_it_does_not_grow_when_as_many_are_drawn_already(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(200)).enrich(sample=50)
        before = path.read_bytes()
        for more in (("--by", "id"), ("--limit", "200"), ("--by", "id")):
            assert bench.command("--sample", "40", *more) == 0
            assert "✓ Sample: 50 of 200 distinct texts (50 drawn earlier), in" in capsys.readouterr().out
        assert path.read_bytes() == before

    def test_a_deleted_row_still_counts_as_drawn(self, bench: Bench) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=100)
        code_sample(path)
        whole = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        assert all(each["corrected_share_low"] == each["corrected_share_high"] for each in whole.values())
        write_sample(path, read_sample(path)[::2])
        half = bench.enrich(gold=path).attrs["enrichment"]["corrected_shares"]
        assert all(each["corrected_share_low"] < each["corrected_share_high"] for each in half.values())

    @pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
    def test_one_that_was_saved_in_another_encoding_is_a_sample_still(
        self, bench: Bench, encoding: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=20)
        code_sample(path)
        path.write_bytes(path.read_bytes().decode("utf-8-sig").encode(encoding))
        assert bench.command("--gold", str(path)) == 0
        assert "=== Shares, corrected by what people coded, with 95 % intervals ===" in capsys.readouterr().out

    def test_a_table_is_a_sample_by_a_column_of_that_name_alone(self, bench: Bench) -> None:
        gold = bench.output.with_name("gold.csv")
        gold.write_text(f"text,my_sample_id,{LABELS[0]}\nviolence and a sample_id,1,1\n")
        assert not module.is_sample(gold)
        gold.write_text(f'sep=;\n"sample_id";{LABELS[0]}\n')
        assert module.is_sample(gold)
        gold.write_text(f"id\tsample_id\t{LABELS[0]}\n", encoding="utf-16")
        assert module.is_sample(gold)

    def test_a_sample_of_another_table_is_refused(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        path = sample_of(bench)
        bench.write(make_texts(100)).enrich(sample=20)
        code_sample(path)
        for texts in ([], ["other texts"]):
            assert bench.write(texts).command("--gold", str(path)) == 2
            assert f"No text of the sample {path} is in {bench.input}" in capsys.readouterr().err

    def test_it_grows_in_another_folder_too(self, bench: Bench, tmp_path: Path) -> None:
        bench.write(make_texts(100)).enrich(sample=20)
        code_sample(sample_of(bench))
        moved = tmp_path / "moved"
        moved.mkdir()
        for path in [each for each in tmp_path.iterdir() if each.is_file()]:
            path.rename(moved / path.name)
        again = Bench(moved, bench.server)
        again.enrich(sample=30)
        assert len(read_sample(sample_of(again))) == 30

    def test_shares_by_group_are_corrected_and_compared_and_drawn(
        self, bench: Bench, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, plot = sample_of(bench), bench.output.with_suffix(".svg")
        texts = make_texts(600)
        sources = ["abc"[number % 3 if number % 9 else 2] for number in range(600)]
        pd.DataFrame({"source": sources, "text": texts}).to_csv(bench.input, index=False)
        bench.enrich(sample=200, by="source")
        code_sample(path)
        assert bench.command("--by", "source", "--gold", str(path), "--plot", str(plot)) == 0
        printed = capsys.readouterr().out
        assert "=== Corrected shares by 'source', and the differences from 'c' in points ===\n" in printed
        assert re.search(r"praising_violence: a +\d+ +[\d.]+% +[\d.]+% \([\d.]+% to [\d.]+%\) +[+-][\d.]+ \(", printed)
        told = json.loads(Path(f"{bench.output}.run.json").read_text())["corrected_shares_by"]
        assert told["column"] == "source"
        assert told["reference"] == "c"
        assert set(told["groups"][LABELS[0]]) == {"a", "b", "c"}
        assert set(told["differences"][LABELS[0]]) == {"a", "b"}
        assert set(told["differences"][LABELS[0]]["a"]) == {"difference", "low", "high"}
        assert b"<svg" in plot.read_bytes()

    def test_the_plot_shows_corrected_shares_too_and_nothing_over_another(self) -> None:
        frame = pd.DataFrame({label: [0, 1] for label in LABELS} | {"by": ["x", "y"]})
        told = {"corrected_share": 0.5, "corrected_share_low": 0.4, "corrected_share_high": 0.6}
        figure = module.plot_labels(frame, LABELS, corrected=dict.fromkeys(LABELS[:2], told))
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
            "all rows (n=2)",
            "all rows, corrected by people",
        ]
        groups = module.plot_labels(frame, LABELS, "by", {}, {label: {"x": told, "y": told} for label in LABELS})
        heights = [
            round(float(y), 3)
            for line in groups.axes[0].get_lines()
            for y in line.get_ydata()
            if line.get_marker() in "os"
        ]
        assert len(set(heights)) == len(heights) == 4 * len(LABELS)

    def test_a_frame_has_no_file_to_fill_in(self) -> None:
        with pytest.raises(module.InputError, match="sample writes a file beside the output"):
            module.enrich_dataframe(pd.DataFrame({"text": ["a"]}), "text", ["x"], sample=5)
