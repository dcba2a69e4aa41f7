# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that loads nothing, light or dark as the reader is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import count

from .blocks import CODE, Code, FigureItem, Item, Section, Table
from .plots import inline_svg

__all__ = ["render_html"]

# Figures use --chosen, --kept, --text, --grid and --series1 to 8: colours.py.
_STYLE = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f8fafc; --text: #334155; --strong: #0f172a;
  --muted: #64748b; --grid: #e2e8f0; --kept: #94a3b8; --chosen: #c2410c;
  --chosen-row: #fff7ed;
  --series1: #0b61a4; --series2: #d9480f; --series3: #0a8f6a; --series4: #b5489a;
  --series5: #c98a00; --series6: #3aa6d8; --series7: #6b5b4d; --series8: #7a5cd6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f172a; --panel: #162033; --text: #cbd5e1; --strong: #f1f5f9;
    --muted: #94a3b8; --grid: #2b3a52; --kept: #64748b; --chosen: #fb923c;
    --chosen-row: #2b2118;
    --series1: #5aa9e6; --series2: #ff8a50; --series3: #3ccf9f; --series4: #e58acb;
    --series5: #f2c14e; --series6: #8fd3f4; --series7: #c2b2a3; --series8: #ab95f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem;
  background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
h1, h2, h3 { color: var(--strong); line-height: 1.25; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; border-bottom: 2px solid var(--grid);
  padding-bottom: .35rem; overflow-wrap: anywhere; }
h3 { font-size: 1.08rem; margin: 2.25rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
.muted, figcaption, footer { color: var(--muted); }
.absent { color: var(--muted); border-left: 3px solid var(--grid);
  padding-left: .75rem; }
nav ul { margin: .5rem 0 0; padding: 0; list-style: none; display: flex;
  flex-wrap: wrap; gap: .25rem 1.1rem; }
a { color: var(--chosen); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
code, pre { font: .88em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas,
  monospace; }
pre { background: var(--panel); border: 1px solid var(--grid); border-radius: 6px;
  padding: .75rem 1rem; overflow-x: auto; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--kept);
  vertical-align: bottom; }
td { border-bottom: 1px solid var(--grid); }
td:first-child { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
.marked td { background: var(--chosen-row); }
.marked td:first-child { box-shadow: inset 3px 0 0 var(--chosen); font-weight: 600; }
summary { cursor: pointer; color: var(--chosen); }
figure { margin: 1rem 0; }
figure svg { display: block; max-width: 100%; height: auto; }
figure svg text { font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial,
  sans-serif !important; }
figcaption { font-size: .9em; max-width: 46rem; }
footer { margin-top: 3.5rem; font-size: .9em; }
@media print { nav { display: none; } h3 { break-after: avoid; } figure, tr {
  break-inside: avoid; } }
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>{footer}</footer>
</body>
</html>
"""


def render_html(
    title: str, groups: Sequence[tuple[str, Sequence[Section]]], footer: str
) -> str:
    """
    Return the report as a page.

    :param title: of the report
    :param groups: heading and sections of each base model
    :param footer: last line
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    names = (f"figure{number}" for number in count(1))
    body = []
    for number, (heading, sections) in enumerate(groups, start=1):
        anchors = [f"model{number}-{_slug(section.title)}" for section in sections]
        links = "".join(
            f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
            for anchor, section in zip(anchors, sections, strict=True)
        )
        body.append(f"<h2>{escape(heading)}</h2>\n<nav><ul>{links}</ul></nav>")
        for anchor, section in zip(anchors, sections, strict=True):
            items = "\n".join(_item(item, names) for item in section.items)
            body.append(
                f'<section id="{anchor}">\n<h3>{escape(section.title)}</h3>\n'
                f"{items}\n</section>"
            )
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        body="\n".join(body),
        footer=escape(footer),
    )


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _item(item: Item, names: Iterator[str]) -> str:
    if isinstance(item, Table):
        return _table(item)
    if isinstance(item, Code):
        return f"<pre><code>{escape(item.text)}</code></pre>"
    if isinstance(item, FigureItem):
        svg = inline_svg(item.draw(), next(names))
        caption = f"<figcaption>{_inline(item.caption)}</figcaption>"
        return f"<figure>\n{svg}\n{caption}\n</figure>"
    attribute = ' class="absent"' if item.is_absence else ""
    return f"<p{attribute}>{_inline(item.text)}</p>"


def _table(table: Table) -> str:
    classes = [' class="number"' if right else "" for right in table.is_numeric]
    header = "".join(
        f"<th{attribute}>{escape(cell)}</th>"
        for cell, attribute in zip(table.header, classes, strict=True)
    )
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(
            f"<td{attribute}>{escape(cell)}</td>"
            for cell, attribute in zip(row, classes, strict=True)
        )
        marked = ' class="marked"' if index in table.marked else ""
        rows.append(f"<tr{marked}>{cells}</tr>")
    text = (
        '<div class="scroll"><table>\n'
        f"<thead><tr>{header}</tr></thead>\n"
        "<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table></div>"
    )
    if not table.is_detail:
        return text
    return f"<details>\n<summary>{table.summary}</summary>\n{text}\n</details>"


def _inline(text: str) -> str:
    """Escape a paragraph; what stands between backquotes becomes code."""
    return CODE.sub(
        lambda match: (
            f"<code>{match[2].removeprefix(' ').removesuffix(' ')}</code>"
            if len(match[1]) > 1
            else f"<code>{match[2]}</code>"
        ),
        escape(text),
    )
