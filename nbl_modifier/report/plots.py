# SPDX-License-Identifier: Apache-2.0
"""The ranking as a figure. matplotlib is imported inside the functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .schema import LayerResult, NBLReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHOSEN, _KEPT, _TEXT = "#c2410c", "#94a3b8", "#334155"


def plot_ranking(report: NBLReport, path: str | os.PathLike[str]) -> None:
    """
    Draw bound and NMSE per layer, chosen layers marked, and write a PNG.

    :param report: a finished run
    :param path: file to write, its directory must exist
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    figure_class, canvas_class = _import_matplotlib()
    layers = sorted(report.layers, key=lambda layer: layer.index)
    width_inches = min(max(7.0, 0.38 * len(layers) + 2.0), 16.0)
    figure = figure_class(figsize=(width_inches, 5.6), layout="constrained")
    canvas_class(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)

    positions = [layer.index for layer in layers]
    chosen = [layer.selected for layer in layers]
    bounds = [layer.cca_bound for layer in layers]
    nmses = [layer.nmse for layer in layers]
    for axes, heights in ((upper, bounds), (lower, nmses)):
        _draw_bars(axes, positions, heights, chosen)
        _style(axes)
    if report.criterion == "nmse":
        _label_ranks(lower, layers, nmses)
    else:
        _label_ranks(upper, layers, bounds)
    upper.set_ylabel(r"CCA bound  $\sum_i (1 - \rho_i^2)$")
    lower.set_ylabel("NMSE of the linear map")
    lower.set_xlabel("decoder layer")
    lower.set_xticks(positions)
    lower.tick_params(axis="x", labelsize=8.5 if len(layers) <= 40 else 5.5)
    _add_legend(upper)
    figure.suptitle(_title(report), fontsize=11, color=_TEXT, x=0.01, ha="left")
    figure.savefig(Path(path), dpi=150, format="png")


def _import_matplotlib() -> tuple[type, type]:
    """Return the figure and the Agg canvas; no global backend, no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ImportError(
            "plot_ranking needs matplotlib, which is not installed. "
            "Run: pip install 'nbl-modifier[plot]'."
        ) from err
    return Figure, FigureCanvasAgg


def _draw_bars(
    axes: Axes, positions: list[int], heights: list[float], chosen: list[bool]
) -> None:
    colors = [_CHOSEN if flag else _KEPT for flag in chosen]
    axes.bar(positions, heights, color=colors, width=0.72, zorder=2)


def _label_ranks(axes: Axes, layers: list[LayerResult], heights: list[float]) -> None:
    """Write the place in the ranking above every bar."""
    size_points = 7.5 if len(layers) <= 40 else 5.5
    for layer, height in zip(layers, heights, strict=True):
        axes.annotate(
            str(layer.rank),
            (layer.index, height),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=size_points,
            color=_CHOSEN if layer.selected else _TEXT,
            fontweight="bold" if layer.selected else "normal",
        )


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color="#e2e8f0", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=_TEXT, labelsize=8.5, length=0)
    axes.yaxis.label.set_color(_TEXT)
    axes.xaxis.label.set_color(_TEXT)
    axes.spines["bottom"].set_color(_KEPT)
    axes.margins(x=0.01, y=0.14)


def _add_legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[
            Patch(color=_CHOSEN, label="attention replaced by a linear map"),
            Patch(color=_KEPT, label="attention kept"),
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=_TEXT,
    )


def _title(report: NBLReport) -> str:
    model = Path(report.model).name or report.model
    return (
        f"{model}: {report.num_replaced} of {report.num_hidden_layers} attention "
        f"layers replaced, ranked by {report.criterion} (1 = replaced first)"
    )
