# SPDX-License-Identifier: Apache-2.0
"""The figures of a report. matplotlib is imported inside the functions."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_modifier.records.compression import LayerResult, NBLReport

from .colours import CHOSEN, CSS_VARIABLES, GRID, KEPT, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Point",
    "correlations_figure",
    "inline_svg",
    "new_figure",
    "plot_ranking",
    "quantile_of",
    "ranking_figure",
    "scatter_figure",
    "style",
]

# On a page: text of 8.5 points comes out as large as the page's own.
_PIXELS_PER_INCH = 104
# Layers up to which labels of full size fit side by side; up to which small ones do;
# and which are labelled if they do not either.
_FEW, _MANY, _EVERY = 40, 90, 5
# Correlations of 1 up to rounding would otherwise set the scale.
_LEAST_UNEXPLAINED = 1e-6


@dataclass(frozen=True)
class Point:
    """
    A model in a figure.

    :param label: written beside it
    :param x: value on the horizontal axis, and its standard error, if known
    :param y: value on the vertical axis, and its standard error, if known
    :param is_base: whether it is the uncompressed model
    """

    label: str
    x: tuple[float, float | None]
    y: tuple[float, float | None]
    is_base: bool


def plot_ranking(report: NBLReport, path: str | os.PathLike[str]) -> None:
    """
    Write the figure of :func:`ranking_figure` as a PNG.

    :param report: a finished run
    :param path: file to write, its directory must exist
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    ranking_figure(report).savefig(Path(path), dpi=150, format="png")


def ranking_figure(report: NBLReport) -> Figure:
    """
    Draw bound and NMSE per layer, chosen layers marked.

    :param report: a finished run
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    figure = new_figure(5.6)
    layers = sorted(report.layers, key=lambda layer: layer.index)
    figure.set_figwidth(_width_inches(len(layers)))
    upper, lower = figure.subplots(2, 1, sharex=True)

    positions = [layer.index for layer in layers]
    chosen = [layer.selected for layer in layers]
    bounds = [layer.cca_bound for layer in layers]
    nmses = [layer.nmse for layer in layers]
    for axes, heights in ((upper, bounds), (lower, nmses)):
        _draw_bars(axes, positions, heights, chosen)
        style(axes)
    if report.criterion == "nmse":
        _label_ranks(lower, layers, nmses)
    else:
        _label_ranks(upper, layers, bounds)
    upper.set_ylabel("CCA bound  Σᵢ (1 − ρᵢ²)")
    lower.set_ylabel("NMSE of the linear map")
    _label_layers(lower, positions)
    _add_legend(upper, report)
    figure.suptitle(
        _title(report), fontsize=11, color=TEXT, x=0.01, ha="left", parse_math=False
    )
    return figure


def correlations_figure(report: NBLReport) -> Figure:
    """
    Draw the spread of ``1 - rho_i^2`` over the directions of each layer.

    Thin line from the least to the greatest, thick line over the middle half, dot at
    the median; logarithmic.

    :param report: a finished run with canonical correlations
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    figure = new_figure(3.4)
    layers = sorted(report.layers, key=lambda layer: layer.index)
    figure.set_figwidth(_width_inches(len(layers)))
    axes = figure.subplots()
    for layer in layers:
        quantiles = layer.canonical_correlations
        if quantiles is None:
            continue
        least, lower, median, upper, greatest = (
            max(
                _LEAST_UNEXPLAINED,
                1.0 - quantile_of(quantiles, q) ** 2,
            )
            for q in (1.0, 0.75, 0.5, 0.25, 0.0)
        )
        color = CHOSEN if layer.selected else KEPT
        axes.vlines(layer.index, least, greatest, color=color, linewidth=1.2, zorder=2)
        axes.vlines(layer.index, lower, upper, color=color, linewidth=5, zorder=3)
        axes.plot([layer.index], [median], "o", color=TEXT, markersize=3.5, zorder=4)
    axes.set_yscale("log")
    style(axes)
    axes.minorticks_off()
    axes.set_ylabel("1 − ρ²  of each direction")
    _label_layers(axes, [layer.index for layer in layers])
    _add_legend(axes, report)
    return figure


def quantile_of(quantiles: Sequence[float], share: float) -> float:
    """
    Return the nearest of evenly spaced quantiles.

    :param quantiles: from the least to the greatest value
    :param share: of the values that are below, 0 to 1
    """
    return quantiles[round(share * (len(quantiles) - 1))]


def scatter_figure(points: Sequence[Point], x_label: str, y_label: str) -> Figure:
    """
    Draw one model per point, with one standard error each way where it is known.

    :param points: the models
    :param x_label: of the horizontal axis, with unit
    :param y_label: of the vertical axis, with unit
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    figure = new_figure(4.0)
    axes = figure.subplots()
    for point in points:
        axes.errorbar(
            point.x[0],
            point.y[0],
            xerr=point.x[1] or None,
            yerr=point.y[1] or None,
            fmt="D" if point.is_base else "o",
            color=TEXT if point.is_base else CHOSEN,
            markersize=6,
            linewidth=1.2,
            capsize=3,
            zorder=3,
        )
        axes.annotate(
            point.label,
            (point.x[0], point.y[0]),
            xytext=(8, 6),
            textcoords="offset points",
            fontsize=8.5,
            color=TEXT,
            parse_math=False,
        )
    style(axes)
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.margins(x=0.18, y=0.18)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    return figure


def inline_svg(figure: Figure, name: str) -> str:
    """
    Return a figure as an SVG element to stand inside an HTML page.

    Text stays text in the page's font, the background is the page's, and colours are
    the page's CSS variables of ``colours.CSS_VARIABLES``, so that the figure follows
    its light or dark theme. Nothing outside is referred to.

    :param figure: of this module
    :param name: distinct on the page, made part of every id
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    root = re.compile(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"')
    width = round(_PIXELS_PER_INCH * figure.get_figwidth())
    svg = root.sub("", svg, count=5).replace("<svg", f'<svg width="{width}"', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.strip()


def new_figure(height_inches: float) -> Figure:
    """
    Return an empty figure that needs no display.

    :param height_inches: of it
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    figure_class, canvas_class = _import_matplotlib()
    figure: Figure = figure_class(figsize=(6.4, height_inches), layout="constrained")
    canvas_class(figure)
    return figure


def _width_inches(num_layers: int) -> float:
    return min(max(7.0, 0.38 * num_layers + 2.0), 16.0)


def _import_matplotlib() -> tuple[type, type]:
    """Return the figure and the Agg canvas; no global backend, no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ImportError(
            "figures need matplotlib, which is not installed. "
            "Run: pip install 'nbl-modifier[plot]'."
        ) from err
    return Figure, FigureCanvasAgg


def _draw_bars(
    axes: Axes, positions: list[int], heights: list[float], chosen: list[bool]
) -> None:
    colors = [CHOSEN if flag else KEPT for flag in chosen]
    axes.bar(positions, heights, color=colors, width=0.72, zorder=2)


def _label_ranks(axes: Axes, layers: list[LayerResult], heights: list[float]) -> None:
    """Write the place in the ranking above every bar."""
    size_points = 7.5 if len(layers) <= _FEW else 5.5
    upright = len(layers) > _MANY  # where three digits are wider than a bar
    for layer, height in zip(layers, heights, strict=True):
        axes.annotate(
            str(layer.rank),
            (layer.index, height),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            rotation=90 if upright else 0,
            fontsize=size_points,
            color=CHOSEN if layer.selected else TEXT,
            fontweight="bold" if layer.selected else "normal",
        )


def style(axes: Axes) -> None:
    """
    Draw axes as all figures have them.

    :param axes: changed in place
    """
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=TEXT, labelsize=8.5, length=0)
    axes.yaxis.label.set_color(TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.spines["bottom"].set_color(KEPT)
    axes.margins(x=0.01, y=0.14)


def _label_layers(axes: Axes, positions: list[int]) -> None:
    axes.set_xlabel("decoder layer")
    axes.set_xticks(positions[:: 1 if len(positions) <= _MANY else _EVERY])
    axes.tick_params(axis="x", labelsize=8.5 if len(positions) <= _FEW else 5.5)


def _add_legend(axes: Axes, report: NBLReport) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[
            Patch(color=CHOSEN, label=f"{report.subject} {report.outcome}"),
            Patch(color=KEPT, label="kept"),
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=TEXT,
    )


def _title(report: NBLReport) -> str:
    model = Path(report.model).name or report.model
    return (
        f"{model}: {report.num_replaced} of {report.num_hidden_layers} "
        f"{report.subject} {report.outcome.split()[0]}, ranked by {report.criterion} "
        "(1 = replaced first)"
    )
