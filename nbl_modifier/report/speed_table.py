# SPDX-License-Identifier: Apache-2.0
"""A benchmark as text: plain for a terminal, markdown for a document."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from nbl_modifier.records.speed import SpeedReport, SpeedRow

from .markdown import escape_markdown

__all__ = ["markdown_speed_table", "speed_summary", "speed_table"]

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


def speed_table(report: SpeedReport) -> str:
    """
    Return the measured rows, aligned: medians, least to greatest in brackets.

    :param report: from one benchmark
    """
    lines = [_HEADER, *map(_cells, report.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def markdown_speed_table(report: SpeedReport) -> str:
    """
    Return the same rows as a markdown table, and those not measured with the reason.

    :param report: from one benchmark
    """
    lines = [
        "| " + " | ".join(_HEADER) + " |",
        "|---" + "|---:" * (len(_HEADER) - 1) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in report.rows),
    ]
    for cell in report.skipped:
        cells = [
            "both",
            f"{cell.context:,}",
            str(cell.batch),
            escape_markdown(f"not run: {cell.reason}"),
        ]
        cells += [""] * (len(_HEADER) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
        _spread(row.base, _speed),
        _spread(row.compressed, _speed),
        _spread(row.ratios, "{:.3f}".format),
        f"{row.predicted_ratio:.3f}",
        f"{row.attained:.2f}",
    )


def _spread(values: list[float], text: Callable[[float], str]) -> str:
    median = text(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({text(min(values))}..{text(max(values))})"


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
