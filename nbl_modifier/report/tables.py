# SPDX-License-Identifier: Apache-2.0
"""The ranking of the layers."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from nbl_modifier.criteria import CRITERIA
from nbl_modifier.records.compression import HeldoutResult, LayerResult, NBLReport

from .table import Table

__all__ = ["Column", "layers_table", "measured_columns", "ranking_table"]


@dataclass(frozen=True)
class Column:
    """
    A column of the ranking.

    :param heading: its name
    :param of: gives a layer's value; None: it has none
    :param digits: how a value is written
    """

    heading: str
    of: Callable[[LayerResult], float | None]
    digits: str

    def cell(self, layer: LayerResult) -> str:
        """Return a layer's value as text, empty if it has none."""
        value = self.of(layer)
        return "" if value is None else format(value, self.digits)


def measured_columns(report: NBLReport, fine: bool = False) -> list[Column]:
    """
    Return a column for everything that was measured in a run.

    :param report: the run
    :param fine: with all digits, and what a terminal has no room for
    """
    columns = []
    for criterion in CRITERIA.values():
        digits = criterion.fine_digits if fine else criterion.digits
        if digits:
            columns.append(Column(criterion.heading, criterion.of, digits))
        if criterion.name == "nmse":
            heldout = attrgetter("heldout_nmse")
            columns.append(Column("held-out NMSE", heldout, digits))
    layers = report.layers
    return [c for c in columns if any(c.of(each) is not None for each in layers)]


def layers_table(report: NBLReport, fine: bool = False) -> Table:
    """
    Return the layers in the order of the ranking, chosen ones marked.

    :param report: a finished run
    :param fine: with all digits, and the score in place of the number of tokens
    """
    last = (
        Column("score", attrgetter("score"), ".5g")
        if fine
        else Column("tokens", attrgetter("num_tokens"), ",")
    )
    columns = [
        Column("rank", attrgetter("rank"), ""),
        Column("layer", attrgetter("index"), ""),
        *measured_columns(report, fine),
        last,
    ]
    header = (*(column.heading for column in columns), "replaced")
    rows = [
        (
            *(column.cell(layer) for column in columns),
            "yes" if layer.selected else "",
        )
        for layer in report.ranking
    ]
    marked = (i for i, layer in enumerate(report.ranking) if layer.selected)
    return Table(header, rows, frozenset(marked), is_detail=fine, name_column=1)


def ranking_table(report: NBLReport) -> str:
    """
    Return what was done, and the ranking, as text for a terminal or a log.

    :param report: a finished run
    :return: several lines without a trailing newline; chosen layers carry ``yes``
    """
    return "\n".join([*_summary(report), "", layers_table(report).to_text()])


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
