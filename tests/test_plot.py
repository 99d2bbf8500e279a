"""Plot: a picture of the shares."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Bench, make_texts

import enrich_dataset as module


class TestBackends:
    def run(
        self, bench: Bench, *more: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "enrich_dataset.py"), *bench.arguments(*more)]
        return subprocess.run(
            command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
        )

    def test_the_backend_of_a_notebook_works(self, bench: Bench) -> None:
        plot, backend = bench.output.with_suffix(".png"), "module://matplotlib_inline.backend_inline"
        run = self.run(bench.write(["cake"]), "--plot", str(plot), "--base-url", bench.server.url, MPLBACKEND=backend)
        assert run.returncode == 0, run.stderr
        assert plot.exists()

    def test_a_backend_that_does_not_exist_is_named_before_anything_is_sent(self, bench: Bench) -> None:
        plot, backend = bench.output.with_suffix(".png"), "no such backend"
        run = self.run(bench.write(["cake"]), "--plot", str(plot), "--base-url", bench.server.url, MPLBACKEND=backend)
        assert run.returncode == 2
        assert f"matplotlib does not know MPLBACKEND '{backend}': unset it." in run.stderr
        assert not bench.server.calls


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

    def test_a_plot_in_a_missing_folder_is_refused_before_anything_is_sent(self, bench: Bench) -> None:
        with pytest.raises(module.InputError, match=r"There is no folder .* for the plot"):
            bench.write(["cake"]).enrich(plot=bench.output.parent / "nowhere" / "plot.png")
        assert bench.server.calls == []

    def test_without_matplotlib_it_says_what_to_install(self, tmp_path: Path) -> None:
        (tmp_path / "matplotlib.py").write_text("raise ImportError")
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport enrich_dataset, pandas\n"
        code += "enrich_dataset.plot_labels(pandas.DataFrame({'a': [1]}), ['a'])"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "A plot needs matplotlib: pip install matplotlib." in run.stderr
