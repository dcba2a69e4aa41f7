# SPDX-License-Identifier: Apache-2.0
"""Names and paragraphs as Markdown and HTML that show them as they are."""

from __future__ import annotations

import re
from html import escape

__all__ = [
    "code",
    "escape_cell",
    "escape_markdown",
    "fenced",
    "html_paragraph",
    "markdown_paragraph",
]

# Code in a paragraph: the fence, and what stands between two of it.
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
# What means something within a line. An underscore does at the edge of a word only, and
# criteria are full of them; a number sign at the edges of a heading.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|$~]|(?<![^\W_])_|_(?![^\W_])|(?<!\S)#|#(?!\S)")
# What means something at the beginning of one.
_OPENING = re.compile(r"^([-+=](?=\s|[-=]|$)|\d+(?=[.)]))")


def code(text: str) -> str:
    """
    Return text to stand in a paragraph as code, whatever is in it.

    :param text: a name, a path
    """
    text = " ".join(text.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def escape_markdown(text: str) -> str:
    """
    Return one line that Markdown shows as the text is.

    :param text: a name, say; line breaks become spaces
    """
    return _OPENING.sub(_escaped_opening, escape_cell(text))


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


def escape_cell(text: str) -> str:
    """
    Return text that Markdown shows as it is within a line, as in a table.

    :param text: a name, say; line breaks become spaces
    """
    return _SPECIAL.sub(lambda match: "\\" + match[0], " ".join(text.split()))


def markdown_paragraph(text: str) -> str:
    """
    Return a paragraph as Markdown; what stands between backquotes stays code.

    :param text: plain, with `code` between backquotes
    """
    parts, end = [], 0
    for match in _CODE.finditer(text):
        parts += [_escaped_part(text[end : match.start()], end), match[0]]
        end = match.end()
    return "".join([*parts, _escaped_part(text[end:], end)])


def _escaped_part(text: str, start: int) -> str:
    line = _SPECIAL.sub(lambda match: "\\" + match[0], re.sub(r"\s", " ", text))
    return line if start else _OPENING.sub(_escaped_opening, line)


def html_paragraph(text: str) -> str:
    """
    Return a paragraph as HTML; what stands between backquotes becomes code.

    :param text: plain, with `code` between backquotes
    """
    return _CODE.sub(
        lambda match: (
            f"<code>{match[2].removeprefix(' ').removesuffix(' ')}</code>"
            if len(match[1]) > 1
            else f"<code>{match[2]}</code>"
        ),
        escape(text),
    )
