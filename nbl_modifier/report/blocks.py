# SPDX-License-Identifier: Apache-2.0
"""What a report is built of before it becomes HTML or Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Code", "FigureItem", "Item", "Section", "Text"]


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
