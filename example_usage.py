"""Enrich the sample, HatefulData.csv, with ten labels.

With OPENAI_API_KEY or OPENAI_BASE_URL set this asks that server (at OpenAI four calls, well under a cent). Without, it
asks a small real model on this machine if its two packages are installed (see tests/local_model.py), else a stand-in
server, over real HTTP, so that you can see what a run looks like before you pay for one.
"""

import contextlib
import os
import sys
from pathlib import Path

from enrich_dataset import EnrichmentError, enrich_dataset

HERE = Path(__file__).parent

LABELS = [
    "incitement_of_violence",
    "praising_violence",
    "praising_extremist_acts",
    "targeting_ethnic_or_racial_groups",
    "ideologically_motivated_threats",
    "anti_democratic_rhetoric",
    "personal_attacks",
    "sexual_harassment",
    "physical_violence",
    "psychological_attacks",
]


def enrich_sample(output: Path, **server: str) -> None:
    frame = enrich_dataset(
        input_filepath=HERE / "HatefulData.csv",
        output_filepath=output,
        text_column="text",
        label_column="label",
        new_labels=LABELS,
        batch_size=10,
        max_workers=3,
        **server,  # base_url and model, else OpenAI's and the default
    )
    print("\nThe three rows with the most labels:")
    counted = frame.assign(labels=frame[LABELS].sum(axis=1)).nlargest(3, "labels")
    print(counted[["id", "label", "labels"]].to_string(index=False))


def main() -> None:
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        enrich_sample(HERE / "HatefulData_enriched.csv")
        return
    sys.path.insert(0, str(HERE / "tests"))
    from local_model import bundled_model, is_installed, local_model
    from stand_in_server import StandIn

    model = bundled_model()
    if is_installed() and model is not None:
        print(f"{model.stem} answers, on this machine: real inference, but a toy-size model, so poor labels.")
        print("For work use a key or a larger model.\n")
        with local_model() as url:
            enrich_sample(HERE / "HatefulData_local_enriched.csv", base_url=url, model=model.stem)
        return
    print("No OPENAI_API_KEY is set, so no model is asked.")
    print("The labels below come from a stand-in server's word rule: they show how a run goes, and mean nothing.\n")
    pace = {"first_token": 0.4, "per_token": 0.012}
    try:  # always at the same address, which is a part of what decides an answer: a second run asks nothing
        server = StandIn(port=8765, **pace)
    except OSError:  # taken
        server = StandIn(**pace)
    with server:
        enrich_sample(HERE / "HatefulData_stand_in_enriched.csv", base_url=server.url)


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt):
            main()
    except EnrichmentError as error:
        sys.exit(f"Error: {error}")
