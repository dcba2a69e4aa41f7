# SPDX-License-Identifier: Apache-2.0
"""Figures of a table of methods. matplotlib is imported inside the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .colours import GRID, SERIES, TEXT
from .methods_table import MethodRow, MethodsTable, Value
from .plots import new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["quality_over", "quality_over_speed"]

# With the colours, so that a line is known where there are none.
_MARKERS = "osD^vPX*"
_PANEL_INCHES = (3.45, 3.5)
_LEGEND_INCHES = 0.55


@dataclass(frozen=True)
class _Panel:
    """
    One quantity of all methods.

    :param y_label: what it is
    :param y: a row's value of it
    :param x_label: of the horizontal axis
    :param x: a row's place there
    :param is_ratio: whether it is over the base model's, drawn logarithmically
    """

    y_label: str
    y: Callable[[MethodRow], Value | None]
    x_label: str
    x: Callable[[MethodRow], Value | None]
    is_ratio: bool


def quality_over(table: MethodsTable, horizontal: str) -> Figure:
    """
    Draw accuracy and perplexity over layers or KV cache, a line for each method.

    arXiv:2505.21077, Figures 4 and 6.

    :param table: of one base model, with a quality at least
    :param horizontal: ``m`` or ``kv_cache``
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    if horizontal == "m":
        x_label = f"of {table.num_layers} layers replaced"

        def x(row: MethodRow) -> Value | None:
            return float(row.m), None
    else:
        x_label = "KV cache per token, % of base"

        def x(row: MethodRow) -> Value | None:
            return 100 * row.kv_cache, None

    return _draw(table, [_Panel(*each[:2], x_label, x, each[2]) for each in _ys(table)])


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
            _line(axes, panel, rows, number, is_best=method == table.best)
        _base_line(axes, panel, base)
        style(axes)
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.margins(x=0.06, y=0.06)
        if panel.is_ratio:
            _logarithmic(axes)
        axes.set_xlabel(panel.x_label, fontsize=9, parse_math=False)
        axes.set_title(
            panel.y_label, fontsize=9.5, color=TEXT, loc="left", parse_math=False
        )
    handles, labels = all_axes[0].get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4 if len(panels) > 1 else 3),
        frameon=False,
        fontsize=9,
        labelcolor=TEXT,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _line(
    axes: Axes, panel: _Panel, rows: Sequence[MethodRow], number: int, *, is_best: bool
) -> None:
    """Draw one method; the best is drawn thicker and above the others."""
    points = [(panel.x(row), panel.y(row)) for row in rows]
    known = sorted((x, y) for x, y in points if x is not None and y is not None)
    axes.errorbar(
        [x[0] for x, _ in known],
        [y[0] for _, y in known],
        xerr=[x[1] or 0.0 for x, _ in known] if any(x[1] for x, _ in known) else None,
        yerr=[y[1] or 0.0 for _, y in known],
        label=rows[0].method,
        color=SERIES[number % len(SERIES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=6.5 if is_best else 5,
        linewidth=2.4 if is_best else 1.3,
        elinewidth=1.2,
        capsize=2.5,
        zorder=4 if is_best else 3,
    )


def _base_line(axes: Axes, panel: _Panel, base: MethodRow | None) -> None:
    value = (1.0, None) if panel.is_ratio else base and panel.y(base)
    if value is not None:
        axes.axhline(
            value[0], color=TEXT, linewidth=1.1, linestyle=(0, (4, 3)), label="base"
        )


def _logarithmic(axes: Axes) -> None:
    """Scale the vertical axis and write its ticks as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    least, greatest = axes.get_ylim()
    range_ = greatest / least
    subs = (1, 1.2, 1.5, 2, 3, 5, 7) if range_ < 12 else (1, 2, 5)
    if range_ < 1.6:
        subs = (1, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs if range_ < 2000 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
