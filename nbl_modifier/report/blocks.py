# SPDX-License-Identifier: Apache-2.0
"""What a report is built of before it becomes HTML or Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CODE", "Code", "FigureItem", "Item", "Section", "Table", "Text", "code"]

# 1,024   0.7529   1.08 ± 0.01   12.5%   4 of 16   3.5 GiB
_NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[+-]\d+)?( ± [\d.]+)?(%| of \d+| [KMGT]?i?B)?")

#: Code in a :class:`Text`: the fence, and what stands between two of it.
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


@dataclass(frozen=True)
class Text:
    """
    A paragraph.

    :param text: plain, with `code` between backquotes
    :param is_absence: whether it says why something is not there
    """

    text: str
    is_absence: bool = False


@dataclass(frozen=True)
class Table:
    """
    Cells as they are shown.

    :param header: of the columns
    :param rows: as long as the header
    :param marked: rows that stand out
    :param is_detail: whether a page shows it on request only
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    marked: frozenset[int] = frozenset()
    is_detail: bool = False

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


@dataclass(frozen=True)
class Code:
    """
    Text shown as it is, in a fixed-width font.

    :param text: several lines
    """

    text: str


@dataclass(frozen=True)
class FigureItem:
    """
    A figure, drawn when it is needed: Markdown does without.

    :param draw: makes it
    :param caption: what it shows; its numbers stand in a table beside it
    """

    draw: Callable[[], Figure]
    caption: str


def code(text: str) -> str:
    """
    Return text to stand in a :class:`Text` as code, whatever is in it.

    :param text: a name, a path
    """
    text = " ".join(text.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


Item = Text | Table | Code | FigureItem


@dataclass(frozen=True)
class Section:
    """
    One heading and what stands below it.

    :param title: heading
    :param items: in order
    """

    title: str
    items: list[Item]
