"""Enrich the sample, HatefulData.csv, with ten labels.

With OPENAI_API_KEY set this asks OpenAI (four calls, well under a cent). Without a key it asks a stand-in
server on this machine, over real HTTP, so that you can see what a run looks like before you pay for one.
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


def enrich_sample(output: Path, base_url: str | None = None) -> None:
    frame = enrich_dataset(
        input_filepath=HERE / "HatefulData.csv",
        output_filepath=output,
        text_column="text",
        label_column="label",
        new_labels=LABELS,
        batch_size=10,
        max_workers=3,
        base_url=base_url,
    )
    print("\nThe three rows with the most labels:")
    counted = frame.assign(labels=frame[LABELS].sum(axis=1)).nlargest(3, "labels")
    print(counted[["id", "label", "labels"]].to_string(index=False))


def main() -> None:
    if os.environ.get("OPENAI_API_KEY"):
        enrich_sample(HERE / "HatefulData_enriched.csv")
        return
    print("No OPENAI_API_KEY is set, so no model is asked.")
    print("The labels below come from a stand-in server's word rule: they show how a run goes, and mean nothing.\n")
    sys.path.insert(0, str(HERE / "tests"))
    from stand_in_server import StandIn

    with StandIn(first_token=0.4, per_token=0.012) as server:
        # A store of its own name, so that these answers are never taken for a model's.
        enrich_sample(HERE / "HatefulData_stand_in_enriched.csv", server.url)


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt):
            main()
    except EnrichmentError as error:
        sys.exit(f"Error: {error}")
