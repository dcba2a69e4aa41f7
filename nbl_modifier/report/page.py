# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that loads nothing, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from .blocks import FigureItem, Section
from .plots import inline_svg
from .templates import render

__all__ = ["render_html", "render_markdown"]

Groups = Sequence[tuple[str, Sequence[Section]]]


def render_html(title: str, groups: Groups, footer: str) -> str:
    """
    Return the report as a page, light or dark as the reader is.

    :param title: of the report
    :param groups: heading and sections of each base model
    :param footer: last line
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    numbers = count(1)

    def draw(item: FigureItem) -> str:
        return inline_svg(item.draw(), f"figure{next(numbers)}")

    return render("page.html", title=title, groups=groups, footer=footer, draw=draw)


def render_markdown(title: str, groups: Groups, footer: str) -> str:
    """
    Return the report as text, without its figures.

    :param title: of the report
    :param groups: heading and sections of each base model
    :param footer: last line
    """
    return render("page.md", title=title, groups=groups, footer=footer)
