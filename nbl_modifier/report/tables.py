# SPDX-License-Identifier: Apache-2.0
"""The ranking as text: plain for a terminal or a log, markdown for a model card."""

from collections.abc import Sequence

from .schema import LayerResult, NBLReport

_HEADER = ("rank", "layer", "bound", "NMSE", "residual NMSE", "tokens", "replaced")


def ranking_table(report: NBLReport) -> str:
    """
    Return the layers in the order of the ranking as aligned plain text.

    :param report: a finished run
    :return: several lines without a trailing newline; chosen layers carry ``yes``
    """
    rows = [_HEADER, *(_row(layer) for layer in report.ranking)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [_aligned(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([_summary(report), "", *lines])


def markdown_table(report: NBLReport) -> str:
    """
    Return the same table in GitHub markdown, chosen layers in bold.

    :param report: a finished run
    """
    lines = [
        "| " + " | ".join(_HEADER) + " |",
        "|" + "---:|" * (len(_HEADER) - 1) + ":---|",
    ]
    for layer in report.ranking:
        cells = _row(layer)
        if layer.selected:
            cells = (cells[0], f"**{cells[1]}**", *cells[2:])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(layer: LayerResult) -> tuple[str, ...]:
    return (
        str(layer.rank),
        str(layer.index),
        f"{layer.cca_bound:.3f}",
        f"{layer.nmse:.4f}",
        f"{layer.residual_nmse:.5f}",
        f"{layer.num_tokens:,}",
        "yes" if layer.selected else "",
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Right-align the numbers, left-align the last column."""
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    cells[-1] = row[-1]
    return "  ".join(cells).rstrip()


def _summary(report: NBLReport) -> str:
    return (
        f"NBL on {report.model}: {report.num_replaced} of {report.num_hidden_layers} "
        f"attention layers replaced, ranked by {report.criterion}, "
        f"input {report.input}"
    )
