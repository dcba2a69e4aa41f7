# SPDX-License-Identifier: Apache-2.0
"""A benchmark as a table, and what it is of."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from nbl_modifier.records.speed import SpeedReport, SpeedRow

from .table import Table

__all__ = ["speed_summary", "speed_table"]

_HEADER = (
    "phase",
    "context",
    "batch",
    "base tokens/s",
    "compressed tokens/s",
    "ratio",
    "predicted",
    "attained",
)


def speed_table(report: SpeedReport, with_skipped: bool = False) -> Table:
    """
    Return the measured rows: medians over rounds, least to greatest in brackets.

    :param report: from one benchmark
    :param with_skipped: also what was not measured, with the reason for its phase
    """
    rows = [_cells(row) for row in report.rows]
    for cell in report.skipped if with_skipped else []:
        cells = (f"not run: {cell.reason}", f"{cell.context:,}", str(cell.batch))
        rows.append((*cells, *[""] * (len(_HEADER) - len(cells))))
    return Table(_HEADER, rows)


def speed_summary(report: SpeedReport) -> str:
    """
    Return what the table is of: models, machine, KV cache; several lines.

    :param report: from one benchmark
    """
    machine, settings = report.machine, report.settings
    lines = [
        f"{report.engine}, {settings['dtype']}, {machine['device']}, "
        f"{machine['threads']} threads, {settings['rounds']} rounds; peaks measured: "
        f"{machine['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{machine['bytes_per_second'] / 1e9:,.1f} GB/s"
    ]
    for label, model in (("base", report.base), ("compressed", report.compressed)):
        kept = model.num_layers - len(model.linearized)
        lines.append(
            f"{label:11s}{model.name} ({model.architecture}): {kept} of "
            f"{model.num_layers} layers with attention, "
            f"{model.weight_bytes / 1e6:,.2f} MB of weights, "
            f"{model.kv_bytes_per_token:,.0f} bytes of KV cache per token"
        )
    return "\n".join(lines + _capacity(report))


def _capacity(report: SpeedReport) -> list[str]:
    capacity = report.capacity
    if capacity.ratio is None:
        measured = [
            model.measured_kv_bytes_per_token
            for model in (report.base, report.compressed)
        ]
        if None in measured:
            return []
        return [
            f"KV cache   {measured[0]:,.0f} -> {measured[1]:,.0f} bytes per token, "
            "measured"
        ]
    predicted = (
        "no limit"
        if capacity.predicted_ratio is None
        else f"{capacity.predicted_ratio:.3f}"
    )
    lines = [
        f"KV cache   {capacity.base_tokens:,} -> {capacity.compressed_tokens:,} "
        f"tokens, {capacity.ratio:.3f} times (predicted {predicted})"
    ]
    lines += [
        f"           largest batch at {int(context):,} tokens: {base:,} -> {mine:,}"
        for context, (base, mine) in capacity.largest_batch.items()
    ]
    return lines


def _cells(row: SpeedRow) -> tuple[str, ...]:
    return (
        row.phase,
        f"{row.context:,}",
        str(row.batch),
        _range(row.base, _speed),
        _range(row.compressed, _speed),
        _range(row.ratios, "{:.3f}".format),
        f"{row.predicted_ratio:.3f}",
        f"{row.attained:.2f}",
    )


def _range(values: list[float], text: Callable[[float], str]) -> str:
    """Return the median, and the least and the greatest if there are several."""
    median = text(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({text(min(values))}..{text(max(values))})"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
