"""In a notebook: the report, one bar, the frame and the picture, and no flood of lines."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from stand_in_server import StandIn

CELLS = (
    "from enrich_dataset import enrich_dataset, plot_labels",
    """frame = enrich_dataset("HatefulData.csv", "out.csv", "text", "label",
                       ["praising_violence", "personal_attacks"], batch_size=5)""",
    "frame.head(2)",
    'plot_labels(frame, ["praising_violence", "personal_attacks"], by="label")',
)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """What each cell shows, after a run in a real kernel."""
    import nbformat
    from nbclient import NotebookClient

    shutil.copy(ROOT / "HatefulData.csv", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    with StandIn(first_token=0.25) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": tmp_path}})
        client.execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_notebook_shows_one_bar_the_summary_and_the_picture(outputs: list[list[dict[str, Any]]]) -> None:
    _, run, head, picture = outputs
    printed = "".join(output["text"] for output in run if output.get("name") == "stdout")
    assert printed.startswith("Loading dataset from HatefulData.csv...\n")
    assert "=== Summary ===\npraising_violence: 2/38 (5.3%)\n" in printed
    bar = "".join(output["text"] for output in run if output.get("name") == "stderr")
    shown = [line.rpartition("\r")[2] for line in bar.split("\n") if line.strip()]
    assert len(shown) <= 2
    assert "8/8 [" in shown[0]
    assert "praising_violence" in head[0]["data"]["text/html"]
    pngs = [output["data"]["image/png"] for output in picture if "image/png" in output.get("data", {})]
    assert len(pngs) == 1
    assert base64.b64decode(pngs[0]).startswith(b"\x89PNG")
