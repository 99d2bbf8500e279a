"""How well corrected shares and their intervals do: many samples of texts whose truth is known.

python tests/simulate_shares.py          # 1,000 draws in each setting: some ten minutes
python tests/simulate_shares.py 200

The limits are those within which a method of 95 % may be, plus or minus two standard errors of so many draws.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parent.parent))
import enrich_dataset as module

FIVE = {"thirty": 0.30, "ten": 0.10, "five": 0.05, "two": 0.02, "one": 0.01}
THREE = {"thirty": 0.30, "ten": 0.10, "five": 0.05}
FIGURES = ("precision", "recall", "f1", "kappa")


class Setting(NamedTuple):
    recall: float
    precision: float
    texts: int = 20_000
    shares: dict[str, float] = FIVE
    repeats: bool = False  # texts occur as often as Zipf's law has it
    coded: float = 1.0  # the part of the sample that is coded, from the top
    unanswered: float = 0.0  # the part of texts without an answer, most of them with the label
    covers: tuple[float, float] = (0.92, 0.985)  # by the corrected share's interval
    width: float = np.inf  # at most, times that of a random sample of the same size with Wilson's interval


SETTINGS = {
    "recall 0.8, precision 0.8": Setting(0.8, 0.8, width=0.85),
    "recall 0.6, precision 0.7": Setting(0.6, 0.7, width=1.0),
    "recall 0.3, precision 0.2": Setting(0.3, 0.2, width=1.10),
    "1,000 texts": Setting(0.8, 0.8, texts=1000, shares=THREE, covers=(0.90, 0.985)),
    "repeated texts": Setting(0.8, 0.8, shares=THREE, repeats=True, covers=(0.92, 1.0)),
    "half of it coded": Setting(0.8, 0.8, coded=0.5),
    "2 % without an answer": Setting(0.8, 0.8, shares=THREE, unanswered=0.02),
}


def population(setting: Setting) -> tuple[Any, Any, Any]:
    """The truth and a model's labels (texts x labels, with exactly these rates), and how often each text occurs."""
    dice, size = np.random.default_rng(7), setting.texts
    truth, model = np.zeros((size, len(setting.shares)), bool), np.zeros((size, len(setting.shares)), np.int8)
    for column, share in enumerate(setting.shares.values()):
        order = dice.permutation(size)
        positives, found = round(size * share), round(size * share * setting.recall)
        truth[order[:positives], column] = True
        model[order[:found], column] = 1
        model[order[positives : positives + round(found * (1 / setting.precision - 1))], column] = 1
    blank = dice.random(size) < np.where(truth.any(axis=1), 2.0, 0.3) * setting.unanswered
    model[blank] = module.BLANK
    counts = np.minimum(200, dice.zipf(2.2, size)) if setting.repeats else np.ones(size, int)
    return truth, model, counts


def simulate(setting: Setting, draws: int, count: int = 300) -> pd.DataFrame:
    """By label: how often intervals cover the truth, the bias, and their width against a random sample's."""
    truth, model, counts = population(setting)
    labels = list(setting.shares)
    keys = [number.to_bytes(16, "big") for number in range(len(truth))]
    predicted = pd.DataFrame(module.label_columns(model, labels))
    sizes = module.sampling_sizes(model, counts[:, None])
    weights = counts / counts.sum()
    right = module.corrected_shares(
        predicted, pd.DataFrame(truth.astype(int), columns=labels), labels, pd.Series(1.0, predicted.index),
        pd.Series(counts),
    )  # fmt: skip
    rows = []
    for seed in range(draws):
        drawn, chances = module.draw_sample(keys, sizes, count, seed)
        people = pd.DataFrame(truth[drawn], drawn, labels).astype("Int8")
        people.iloc[round(setting.coded * count) :] = pd.NA
        shares = module.corrected_shares(predicted, people, labels, pd.Series(chances[drawn], drawn), pd.Series(counts))
        dice = np.random.default_rng(seed)
        alone = truth[dice.choice(len(truth), count, replace=False)].sum(axis=0)
        for column, label in enumerate(labels):
            told, share = shares.loc[label], float(truth[:, column] @ weights)
            low, high = module.wilson(alone[column], count)
            rows.append(
                {
                    "label": label,
                    "true": share,
                    "raw": told["raw_share"],
                    "corrected": told["corrected_share"],
                    "covers": told["corrected_share_low"] <= share <= told["corrected_share_high"],
                    **{
                        f"{name}_covers": told[f"{name}_low"] <= right.loc[label, name] <= told[f"{name}_high"]
                        for name in FIGURES
                    },
                    "width": told["corrected_share_high"] - told["corrected_share_low"],
                    "random_width": high - low,
                }
            )
    frame = pd.DataFrame(rows)
    means = frame.groupby("label", sort=False).mean(numeric_only=False).astype(float)
    error = frame.groupby("label", sort=False)["corrected"].std() / draws**0.5
    return means.assign(error=error, relative_width=means["width"] / means["random_width"])


def misses(setting: Setting, figures: pd.DataFrame, draws: int) -> list[str]:
    """Which criteria do not hold."""
    slack = 2 * (0.95 * 0.05 / draws) ** 0.5
    low, high = setting.covers
    found = []
    for label, row in figures.iterrows():
        if not low - slack <= row["covers"] <= high + slack:
            found.append(f"{label}: the share covers in {row['covers']:.1%}")
        found += [
            f"{label}: {name} covers in {row[f'{name}_covers']:.1%}"
            for name in FIGURES
            if not 0.91 - slack <= row[f"{name}_covers"] <= 0.99 + slack and setting.covers[1] < 1
        ]
        if abs(row["corrected"] - row["true"]) > max(0.03 * row["true"], 3.5 * row["error"]):
            found.append(f"{label}: {row['corrected']:.4f} in the mean, {row['true']:.4f} is true")
    if figures["relative_width"].mean() > setting.width + slack:
        found.append(f"width {figures['relative_width'].mean():.2f} of a random sample's")
    return found


if __name__ == "__main__":
    for name, setting in SETTINGS.items():
        draws = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
        figures = simulate(setting, draws)
        print(
            f"\n{name}: {draws:,} draws of 300 from {setting.texts:,}; {misses(setting, figures, draws) or 'all hold'}"
        )
        print(figures.round(4).to_string())
