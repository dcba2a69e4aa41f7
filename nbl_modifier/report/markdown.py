# SPDX-License-Identifier: Apache-2.0
"""A report as Markdown whose tables are aligned, so that a terminal shows them too."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Code, FigureItem, Item, Section, Table

__all__ = ["render_markdown"]


def render_markdown(
    title: str, groups: Sequence[tuple[str, Sequence[Section]]], footer: str
) -> str:
    """
    Return the report as text.

    :param title: of the report
    :param groups: heading and sections of each base model
    :param footer: last line
    """
    parts = [f"# {title}"]
    for heading, sections in groups:
        parts.append(f"## {heading}")
        for section in sections:
            parts.append(f"### {section.title}")
            parts += [text for item in section.items if (text := _item(item))]
    return "\n\n".join([*parts, footer]) + "\n"


def _item(item: Item) -> str:
    if isinstance(item, Table):
        return aligned_table(item)
    if isinstance(item, Code):
        return f"```\n{item.text}\n```"
    if isinstance(item, FigureItem):
        return ""  # its numbers stand in the table beside it
    return f"*{item.text}*" if item.is_absence else item.text


def aligned_table(table: Table) -> str:
    """
    Return a Markdown table whose columns have one width, numbers to the right.

    Marked rows have a bold first cell.

    :param table: its cells
    """
    rows = [
        (f"**{row[0]}**", *row[1:]) if index in table.marked else row
        for index, row in enumerate(table.rows)
    ]
    lines = [
        tuple(cell.replace("|", "\\|") for cell in row) for row in (table.header, *rows)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    to_right = table.is_numeric
    texts = [
        " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        )
        for line in lines
    ]
    rule = "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, to_right, strict=True)
    )
    header, *body = (f"| {text} |" for text in texts)
    return "\n".join([header, f"|{rule}|", *body])
