"""How well corrected shares and their intervals do: many samples of 300 from 20,000 texts whose truth is known.

python tests/simulate_shares.py          # 1,000 draws in each setting, a few minutes
python tests/simulate_shares.py 200
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parent.parent))
import enrich_dataset as module

SHARES = {"thirty": 0.30, "ten": 0.10, "five": 0.05, "two": 0.02, "also_two": 0.02}
SETTINGS = {"recall 0.8, precision 0.8": (0.8, 0.8), "recall 0.6, precision 0.7": (0.6, 0.7)}


def population(recall: float, precision: float, size: int = 20_000) -> tuple[Any, Any]:
    """The truth and a model's labels: texts x labels, with exactly these rates."""
    dice = np.random.default_rng(7)
    truth, model = np.zeros((2, size, len(SHARES)), bool)
    for column, share in enumerate(SHARES.values()):
        order = dice.permutation(size)
        positives, found = round(size * share), round(size * share * recall)
        truth[order[:positives], column] = True
        model[order[:found], column] = True
        model[order[positives : positives + round(found * (1 / precision - 1))], column] = True
    return truth, model


def simulate(recall: float, precision: float, draws: int, count: int = 300) -> pd.DataFrame:
    """By label: the mean of the corrected shares, how often intervals cover the truth, and their mean width."""
    truth, model = population(recall, precision)
    keys = [number.to_bytes(16, "big") for number in range(len(truth))]
    predicted = pd.DataFrame(model.astype(int), columns=list(SHARES))
    rows = []
    for seed in range(draws):
        drawn, probabilities = module.draw_sample(keys, model, count, seed)
        people = pd.DataFrame(truth[drawn].astype(int), drawn, list(SHARES))
        chances = pd.Series(probabilities[drawn], drawn)
        shares = module.corrected_shares(predicted, people, list(SHARES), chances)
        for column, label in enumerate(SHARES):
            figures = shares.loc[label]
            share = truth[:, column].mean()
            rows.append(
                {
                    "label": label,
                    "true_share": share,
                    "raw_share": figures["raw_share"],
                    "corrected": figures["corrected_share"],
                    "covers": figures["corrected_share_low"] <= share <= figures["corrected_share_high"],
                    "recall_covers": figures["recall_low"] <= recall <= figures["recall_high"],
                    "width": figures["corrected_share_high"] - figures["corrected_share_low"],
                }
            )
    frame = pd.DataFrame(rows)
    means = frame.groupby("label", sort=False).mean()
    return means.assign(error=frame.groupby("label", sort=False)["corrected"].std() / draws**0.5)


if __name__ == "__main__":
    for name, (recall, precision) in SETTINGS.items():
        draws = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
        print(f"\n{name}, {draws:,} draws of 300 from 20,000")
        print(simulate(recall, precision, draws).round(4).to_string())
