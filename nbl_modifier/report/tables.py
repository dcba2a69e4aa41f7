# SPDX-License-Identifier: Apache-2.0
"""The ranking as text: plain for a terminal or a log, markdown for a model card."""

from collections.abc import Sequence

from nbl_modifier.records.compression import HeldoutResult, NBLReport

# The columns, and how a value is written; those without a value anywhere are left out.
_COLUMNS: dict[str, tuple[str, str]] = {
    "rank": ("rank", ""),
    "layer": ("index", ""),
    "bound": ("cca_bound", ".3f"),
    "NMSE": ("nmse", ".4f"),
    "held-out NMSE": ("heldout_nmse", ".4f"),
    "residual NMSE": ("residual_nmse", ".5f"),
    "loss": ("loss", "+.4f"),
    "KL": ("kl", ".4f"),
    "KL x angle": ("kl_angle", ".5f"),
    "tokens": ("num_tokens", ","),
}


def ranking_table(report: NBLReport) -> str:
    """
    Return the layers in the order of the ranking as aligned plain text.

    :param report: a finished run
    :return: several lines without a trailing newline; chosen layers carry ``yes``
    """
    header, *cells = _cells(report)
    rows = [header, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [_aligned(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*_summary(report), "", *lines])


def markdown_table(report: NBLReport) -> str:
    """
    Return the same table in GitHub markdown, chosen layers in bold.

    :param report: a finished run
    """
    header, *rows = _cells(report)
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "---:|" * (len(header) - 1) + ":---|",
    ]
    for layer, cells in zip(report.ranking, rows, strict=True):
        if layer.selected:
            cells = [cells[0], f"**{cells[1]}**", *cells[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(report: NBLReport) -> list[list[str]]:
    """Return the table, its header first."""
    columns = [
        (header, name, form)
        for header, (name, form) in _COLUMNS.items()
        if any(getattr(layer, name) is not None for layer in report.layers)
    ]
    rows = [[*(header for header, _, _ in columns), "replaced"]]
    for layer in report.ranking:
        cells = [_cell(getattr(layer, name), form) for _, name, form in columns]
        rows.append([*cells, "yes" if layer.selected else ""])
    return rows


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Right-align the numbers, left-align the last column."""
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    cells[-1] = row[-1]
    return "  ".join(cells).rstrip()


def _summary(report: NBLReport) -> list[str]:
    """Return what was done, and on what grounds."""
    greedily = ", greedily" if report.selection == "greedy" else ""
    refitted = ", refitted" if report.refit else ""
    distilled = ", distilled" if report.distill_epochs else ""
    low_rank = "" if report.rank is None else f", rank {report.rank}"
    reads = "" if report.method == "drop" else f", input {report.input}{low_rank}"
    lines = [
        f"NBL on {report.model}: {report.num_replaced} of {report.num_hidden_layers} "
        f"{report.subject} {report.outcome.split()[0]}{refitted}"
        f"{distilled}, "
        f"ranked by {report.criterion}{greedily}{reads}"
    ]
    if report.heldout is not None:
        lines.append(_heldout(report.heldout))
    return lines


def _heldout(heldout: HeldoutResult) -> str:
    text = (
        f"perplexity on {heldout.num_windows} held-out windows "
        f"({heldout.num_tokens:,} tokens): {heldout.base:.3f} before, "
        f"{heldout.replaced:.3f} after ({heldout.replaced / heldout.base - 1:+.2%})"
    )
    for how in ("refitted", "distilled"):
        perplexity = getattr(heldout, how)
        if perplexity is not None:
            change = perplexity / heldout.base - 1
            text += f", {perplexity:.3f} {how} ({change:+.2%})"
    return text
