# SPDX-License-Identifier: Apache-2.0
"""The figure holds the numbers of the report, and matplotlib stays optional."""

import itertools
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.report import plots
from tests.report.report_factory import BOUNDS, make_report


def drawn_figure(monkeypatch: pytest.MonkeyPatch, path: Path, **changes: object) -> Any:
    """Return the figure that ``plot_ranking`` made."""
    figures = []
    figure_class, canvas_class = plots._import_matplotlib()

    def record(*args: Any, **kwargs: Any) -> Any:
        figures.append(figure_class(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(plots, "_import_matplotlib", lambda: (record, canvas_class))
    plots.plot_ranking(make_report(**changes), path)
    return figures[0]


def test_png_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ranking.png"
    plots.plot_ranking(make_report(), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1050, 840)


def test_bars_are_bound_and_nmse_with_chosen_layers_coloured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upper, lower = drawn_figure(monkeypatch, tmp_path / "a.png").axes
    assert [bar.get_height() for bar in upper.patches] == list(BOUNDS.values())
    expected = [bound / 10 for bound in BOUNDS.values()]
    assert [bar.get_height() for bar in lower.patches] == expected
    colors = [bar.get_facecolor() for bar in upper.patches]
    assert colors[0] == colors[2] != colors[1] == colors[3]


@pytest.mark.parametrize(("criterion", "panel"), [("cca_bound", 0), ("nmse", 1)])
def test_ranks_stand_on_the_panel_of_the_criterion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, criterion: str, panel: int
) -> None:
    figure = drawn_figure(monkeypatch, tmp_path / "a.png", criterion=criterion)
    labels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert labels[panel] == ["2", "4", "1", "3"]
    assert labels[1 - panel] == []


def test_title_says_model_criterion_and_how_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    title = drawn_figure(monkeypatch, tmp_path / "a.png")._suptitle.get_text()
    for words in ("some-model", "2 of 4", "cca_bound"):
        assert words in title


@pytest.mark.parametrize("num_layers", [30, 40, 41, 80, 90, 91, 126])
def test_labels_of_many_layers_do_not_overlap(num_layers: int) -> None:
    """Those of layers along the axis, and of the ranks above the bars."""
    one = make_report().layers[0]
    layers = [replace(one, index=i, rank=num_layers - i) for i in range(num_layers)]
    figure = plots.ranking_figure(
        make_report(num_hidden_layers=num_layers, layers=layers)
    )
    figure.draw_without_rendering()
    upper, lower = figure.axes
    for labels in (upper.texts, lower.get_xticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) >= 18
        for left, right in itertools.pairwise(boxes):
            assert left.x1 < right.x0


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from nbl_modifier.report.plots import plot_ranking\n"
        "try: plot_ranking(None, 'x.png')\n"
        "except ImportError as err: print(err)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'nbl-modifier[plot]'" in result.stdout


def test_dollars_in_names_are_dollars(tmp_path: Path) -> None:
    """Two make a formula in matplotlib, and one that cannot be read is an error."""
    name = r"a$\frac$b"
    plots.plot_ranking(make_report(model=name), tmp_path / "a.png")
    point = plots.Point(name, (1.0, None), (1.0, None), is_base=True)
    figure = plots.scatter_figure([point], f"x {name}", f"y {name}")
    svg = plots.inline_svg(figure, "figure1")
    assert svg.count(name) == 3
