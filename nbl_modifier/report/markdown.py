# SPDX-License-Identifier: Apache-2.0
"""A report as Markdown whose tables are aligned, so that a terminal shows them too."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .blocks import CODE, Code, FigureItem, Item, Section, Table

__all__ = ["escape_markdown", "fenced", "render_markdown"]

# What means something within a line. An underscore does at the edge of a word only, and
# criteria are full of them; a number sign at the edges of a heading.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|$~]|(?<![^\W_])_|_(?![^\W_])|(?<!\S)#|#(?!\S)")
# What means something at the beginning of one.
_OPENING = re.compile(r"^([-+=](?=\s|[-=]|$)|\d+(?=[.)]))")


def render_markdown(
    title: str, groups: Sequence[tuple[str, Sequence[Section]]], footer: str
) -> str:
    """
    Return the report as text.

    :param title: of the report
    :param groups: heading and sections of each base model
    :param footer: last line
    """
    parts = [f"# {escape_markdown(title)}"]
    for heading, sections in groups:
        parts.append(f"## {escape_markdown(heading)}")
        for section in sections:
            parts.append(f"### {escape_markdown(section.title)}")
            parts += [text for item in section.items if (text := _item(item))]
    return "\n\n".join([*parts, footer]) + "\n"


def escape_markdown(text: str) -> str:
    """
    Return one line that Markdown shows as the text is.

    :param text: a name, say; line breaks become spaces
    """
    return _OPENING.sub(_escaped_opening, _escaped_cell(text))


def fenced(text: str, language: str = "") -> str:
    """
    Return lines as they are, between fences that are longer than any in them.

    :param text: several lines
    :param language: of them, for colours
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _escaped_opening(match: re.Match[str]) -> str:
    # of a list the dot is what counts: a digit cannot be escaped
    return f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}"


def _item(item: Item) -> str:
    if isinstance(item, Table):
        text = aligned_table(item)
        if not item.is_detail:
            return text
        return f"<details>\n<summary>{item.summary}</summary>\n\n{text}\n\n</details>"
    if isinstance(item, Code):
        return fenced(item.text)
    if isinstance(item, FigureItem):
        return ""  # its numbers stand in the table beside it
    text = _paragraph(item.text)
    return f"*{text}*" if item.is_absence else text


def _paragraph(text: str) -> str:
    """Escape a paragraph but for what stands between backquotes, which is code."""
    parts, end = [], 0
    for match in CODE.finditer(text):
        parts += [_escaped_part(text[end : match.start()], end), match[0]]
        end = match.end()
    return "".join([*parts, _escaped_part(text[end:], end)])


def _escaped_part(text: str, start: int) -> str:
    line = _SPECIAL.sub(lambda match: "\\" + match[0], re.sub(r"\s", " ", text))
    return line if start else _OPENING.sub(_escaped_opening, line)


def aligned_table(table: Table) -> str:
    """
    Return a Markdown table whose columns have one width, numbers to the right.

    Marked rows have a bold first cell.

    :param table: its cells
    """
    lines = [tuple(map(_escaped_cell, row)) for row in (table.header, *table.rows)]
    for index in table.marked:
        first, *others = lines[index + 1]
        lines[index + 1] = (f"**{first}**", *others)
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


def _escaped_cell(text: str) -> str:
    # nothing means more at the beginning of a cell than within it
    return _SPECIAL.sub(lambda match: "\\" + match[0], " ".join(text.split()))
