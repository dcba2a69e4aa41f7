# SPDX-License-Identifier: Apache-2.0
"""Figures of a table of methods. matplotlib is imported inside the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbl_modifier.records.methods import MethodRow, MethodsTable, Value

from .colours import GRID, SERIES, TEXT
from .plots import new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["quality_over", "quality_over_speed"]

# With the colours, so that a line is known where there are none.
_MARKERS = "osD^vPX*"
_PANEL_INCHES = (3.45, 3.5)
_LEGEND_INCHES = 0.55
# Ticks of a logarithmic axis in each decade, by how much of one is shown.
_FINEST = (1.0, 1.02, 1.05, 1.1, 1.15, 9.0, 9.5, 9.8)
_FINE = (1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 9.0)
_MIDDLE = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)
# What is worse than this many times the base model is of no use to anyone, and would
# press together what is.
_MOST_TIMES_BASE = 5.0


@dataclass(frozen=True)
class _Panel:
    """
    One quantity of all methods.

    :param y_label: what it is
    :param y: a row's value of it
    :param x_label: of the horizontal axis
    :param x: a row's place there
    :param is_ratio: whether it is over the base model's, drawn logarithmically
    :param ticks: of the horizontal axis, where not those that matplotlib chooses
    :param is_inverted: whether that axis falls to the right
    """

    y_label: str
    y: Callable[[MethodRow], Value | None]
    x_label: str
    x: Callable[[MethodRow], Value | None]
    is_ratio: bool
    ticks: list[float] | None = None
    is_inverted: bool = False


def quality_over(table: MethodsTable, horizontal: str) -> Figure:
    """
    Draw accuracy and perplexity over layers or KV cache, a line for each method.

    arXiv:2505.21077, Figures 4 and 6.

    :param table: of one base model, with a quality at least
    :param horizontal: ``m`` or ``kv_cache``
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    if horizontal == "m":
        x_label = f"layers or blocks replaced, of {table.num_layers}"

        def x(row: MethodRow) -> Value | None:
            return float(row.m), None
    else:
        x_label = "KV cache per token, % of base"

        def x(row: MethodRow) -> Value | None:
            return 100 * row.kv_cache, None

    places = {place[0] for row in table.rows if (place := x(row)) is not None}
    panels = [
        _Panel(*each[:2], x_label, x, each[2], sorted(places), horizontal != "m")
        for each in _ys(table)
    ]
    return _draw(table, panels)


def quality_over_speed(table: MethodsTable) -> Figure:
    """
    Draw the first quality over each measured speed; arXiv:2505.21077, Figure 2.

    :param table: of one base model, with a speed and a quality at least
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    names = dict.fromkeys(name for row in table.rows for name in row.speed)
    y_label, y, is_ratio = _ys(table)[0]

    def speed_of(name: str) -> Callable[[MethodRow], Value | None]:
        return lambda row: (1.0, None) if row.m == 0 else row.speed.get(name)

    panels = [
        _Panel(y_label, y, f"tokens/s, times base\n{name}", speed_of(name), is_ratio)
        for name in names
    ]
    return _draw(table, panels)


def _ys(
    table: MethodsTable,
) -> list[tuple[str, Callable[[MethodRow], Value | None], bool]]:
    """Return the qualities that any model has: label, value, whether a ratio."""
    found: list[tuple[str, Callable[[MethodRow], Value | None], bool]] = []
    if any(row.average for row in table.rows):
        count = max(len(row.tasks) for row in table.rows)
        label = f"accuracy, mean of {count} tasks"
        found.append((label, lambda row: row.average, False))

    def ratio_of(name: str) -> Callable[[MethodRow], Value | None]:
        return lambda row: row.texts[name].over_base if name in row.texts else None

    for name in dict.fromkeys(name for row in table.rows for name in row.texts):
        found.append((f"perplexity on {name}, times base", ratio_of(name), True))
    return found


def _draw(table: MethodsTable, panels: Sequence[_Panel]) -> Figure:
    width, height = _PANEL_INCHES
    figure = new_figure(height + _LEGEND_INCHES)
    figure.set_figwidth(max(width * len(panels), 5.0))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    methods = list(dict.fromkeys(row.method for row in table.rows if row.m))
    base = next((row for row in table.rows if row.m == 0), None)
    for axes, panel in zip(all_axes, panels, strict=True):
        for number, method in enumerate(methods):
            rows = [row for row in table.rows if row.method == method]
            style_of = _line_style(number, is_best=method == table.best)
            _draw_line(axes, panel, rows, base, style_of)
        _draw_base(axes, panel, base)
        style(axes)
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.margins(x=0.05, y=0.06)
        title = panel.y_label
        if panel.is_ratio:
            axes.set_yscale("log")
            least, greatest = axes.get_ylim()
            if greatest > 2 * _MOST_TIMES_BASE:
                axes.set_ylim(max(least, 0.9), _MOST_TIMES_BASE)
                title += f", up to {_MOST_TIMES_BASE:g}"
            _plain_ticks(axes)
        if panel.ticks:
            axes.set_xticks(panel.ticks, [f"{tick:.0f}" for tick in panel.ticks])
        if panel.is_inverted:
            axes.invert_xaxis()
        axes.set_xlabel(panel.x_label, fontsize=9, parse_math=False)
        axes.set_title(title, fontsize=9.5, color=TEXT, loc="left", parse_math=False)
    _add_legend(figure, all_axes[0], 4 if len(panels) > 1 else 3)
    return figure


def _line_style(number: int, *, is_best: bool) -> dict[str, Any]:
    """Return how the line of a method looks; the best is thicker and on top."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 6.5 if is_best else 5,
        "linewidth": 2.4 if is_best else 1.3,
        "elinewidth": 1.2,
        "capsize": 2.5,
        "zorder": 4 if is_best else 3,
    }


def _draw_line(
    axes: Axes,
    panel: _Panel,
    rows: Sequence[MethodRow],
    base: MethodRow | None,
    style_of: dict[str, Any],
) -> None:
    """Draw one method, from the base model on."""
    points = [(panel.x(row), panel.y(row)) for row in rows]
    known = sorted((x, y) for x, y in points if x is not None and y is not None)
    axes.errorbar(
        [x[0] for x, _ in known],
        [y[0] for _, y in known],
        xerr=[x[1] or 0.0 for x, _ in known] if any(x[1] for x, _ in known) else None,
        yerr=[y[1] or 0.0 for _, y in known],
        label=rows[0].method,
        **style_of,
    )
    x, y = (panel.x(base), panel.y(base)) if base is not None else (None, None)
    if known and x is not None and y is not None:
        start = x[0]
        nearest = min(known, key=lambda point: abs(point[0][0] - start))
        axes.plot(
            [start, nearest[0][0]],
            [y[0], nearest[1][0]],
            color=style_of["color"],
            linewidth=style_of["linewidth"],
            zorder=style_of["zorder"],
        )


def _draw_base(axes: Axes, panel: _Panel, base: MethodRow | None) -> None:
    value = None if base is None else panel.y(base)
    if value is not None:
        axes.axhline(
            value[0], color=TEXT, linewidth=1.1, linestyle=(0, (4, 3)), label="base"
        )


def _add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Explain the lines of all panels below them, the base model last."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(entries, key=lambda e: e[1] == "base"), strict=True)
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), columns),
        frameon=False,
        fontsize=9,
        labelcolor=TEXT,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plain_ticks(axes: Axes) -> None:
    """Write the ticks of a logarithmic vertical axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    least, greatest = axes.get_ylim()
    choices = {1.2: _FINEST, 1.6: _FINE, 12.0: _MIDDLE, 500.0: (1.0, 2.0, 5.0)}
    subs = next((s for r, s in choices.items() if greatest / least < r), (1.0,))
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
