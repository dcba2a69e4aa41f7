# SPDX-License-Identifier: Apache-2.0
"""A table, and the three forms it is shown in: plain text, Markdown and HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .escaping import escape_cell

__all__ = ["Table"]

# 1,024   0.7529   1.08 ± 0.01   93.3% +- 0.3%   10 (9..12)   12.5%   4 of 16   3 GiB
_NUMBER = re.compile(
    r"[-+]?[\d,]+(\.\d+)?(e[+-]\d+)?%?( (±|\+-) [\d.,]+)?"
    r"( \([\d.,]+\.\.[\d.,]+\))?(%| of \d+| [KMGT]?i?B)?"
)


@dataclass(frozen=True)
class Table:
    """
    Cells as they are shown; columns of numbers are aligned to the right.

    :param header: of the columns
    :param rows: as long as the header
    :param marked: rows that stand out
    :param is_detail: whether a page shows it on request only
    :param name_column: the column that says what a row is of
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    marked: frozenset[int] = frozenset()
    is_detail: bool = False
    name_column: int = 0

    @property
    def summary(self) -> str:
        """What is shown of a detail before it is asked for."""
        return f"The numbers, {len(self.rows):,} rows"

    @property
    def is_numeric(self) -> list[bool]:
        """By column, whether it holds numbers and nothing else."""
        return [
            all(not row[column] or _NUMBER.fullmatch(row[column]) for row in self.rows)
            for column in range(len(self.header))
        ]

    def to_text(self) -> str:
        """Return aligned lines for a terminal or a log, without a line break behind."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join("  ".join(self._padded(row, widths)).rstrip() for row in lines)

    def to_markdown(self) -> str:
        """Return a Markdown table, aligned in the source too; marked rows are bold."""
        lines = [tuple(map(escape_cell, row)) for row in (self.header, *self.rows)]
        for index in self.marked:
            cells = list(lines[index + 1])
            cells[self.name_column] = f"**{cells[self.name_column]}**"
            lines[index + 1] = tuple(cells)
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = "|".join(
            "-" * (width + 1) + (":" if right else "-")
            for width, right in zip(widths, self.is_numeric, strict=True)
        )
        header, *body = (f"| {' | '.join(self._padded(r, widths))} |" for r in lines)
        return "\n".join([header, f"|{rule}|", *body])

    def to_html(self) -> str:
        """Return an HTML table; marked rows have the class ``marked``."""
        from .templates import render

        return render("table.html", table=self)

    def _padded(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, self.is_numeric, strict=True)
        ]
