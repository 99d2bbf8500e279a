"""Several people who code the same texts: how far they agree, what most of them say, and what is left open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
import pytest
from conftest import LABELS, Bench, make_texts
from test_sampling import code, read_sample, sample_of, truth, write_sample

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
            module.krippendorff_alpha(large[:, start : start + 150], np.ones(150), 0) for start in range(0, 30_000, 150)
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
        code(path, rule=rule)
    rows = read_sample(paths[2])
    for row in rows[: count // 2]:
        row |= dict.fromkeys(LABELS, "")
    write_sample(paths[2], rows)
    return paths


class TestCommand:
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
        code(final, count=30)
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

    def test_files_alike_are_told(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
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
