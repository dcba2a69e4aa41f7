# SPDX-License-Identifier: Apache-2.0
"""One table, three forms: the same cells, aligned, escaped and marked."""

import re
from html.parser import HTMLParser

import pytest

from nbl_modifier.report.table import Table

ROWS = [("a", "9.5", "1, 2"), ("long name", "10.25 ± 0.50", "3")]
TABLE = Table(("model", "value", "layers"), ROWS, frozenset({1}))


class Cells(HTMLParser):
    """Cells of an HTML table, each with its class, and the classes of the rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str | None]]] = []
        self.classes: list[str | None] = []
        self._text: str | None = None
        self._class: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
            self.classes.append(dict(attrs).get("class"))
        if tag in ("th", "td"):
            self._text, self._class = "", dict(attrs).get("class")

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self.rows[-1].append((self._text or "", self._class))
            self._text = None


def test_markdown_columns_are_aligned() -> None:
    text = TABLE.to_markdown()
    header, rule, *lines = text.splitlines()
    assert len({len(line) for line in text.splitlines()}) == 1
    assert re.fullmatch(r"\|-+\|-+:\|-+\|", rule)
    assert header.startswith("| model")
    assert lines[0].split("|")[2].endswith(" 9.5 ")
    assert lines[1].startswith("| **long name** |")


def test_text_columns_are_aligned() -> None:
    assert TABLE.to_text().splitlines() == [
        "model             value  layers",
        "---------  ------------  ------",
        "a                   9.5  1, 2",
        "long name  10.25 ± 0.50  3",
    ]


def test_html_has_the_cells() -> None:
    cells = Cells(TABLE.to_html())
    number = "number"
    assert cells.rows == [
        [("model", None), ("value", number), ("layers", None)],
        [("a", None), ("9.5", number), ("1, 2", None)],
        [("long name", None), ("10.25 ± 0.50", number), ("3", None)],
    ]
    assert cells.classes == [None, None, "marked"]


def test_marked_rows_are_bold_where_their_name_is() -> None:
    table = Table(("rank", "layer"), [("1", "7"), ("2", "8")], frozenset({0}), False, 1)
    assert table.to_markdown().splitlines()[2:] == [
        "|    1 | **7** |",
        "|    2 |     8 |",
    ]


@pytest.mark.parametrize("name", ["a|b", "<b>", "*x*", "a & b", "`x`", "[l](u)"])
def test_cells_are_shown_as_they_are(name: str) -> None:
    from markdown_it import MarkdownIt

    table = Table((name, "x"), [(name, "1")])
    renderer = MarkdownIt("commonmark").enable("table")
    for html in (table.to_html(), renderer.render(table.to_markdown())):
        texts = [[text for text, _ in row] for row in Cells(html).rows]
        assert texts == [[name, "x"], [name, "1"]]
    assert table.to_text().splitlines()[2].split("  ")[0].rstrip() == name


@pytest.mark.parametrize(
    ("cell", "is_number"),
    [
        ("1,024", True),
        ("-0.7529", True),
        ("+0.0100", True),
        ("1e-07", True),
        ("1.08 ± 0.01", True),
        ("50.0 ± 10.0%", True),
        ("93.3% +- 0.3%", True),
        ("1.250 (1.200..1.300)", True),
        ("4 of 16", True),
        ("3.5 GiB", True),
        ("", True),
        ("1, 2", False),
        ("m = 4", False),
        ("16 layers", False),
        ("nan", False),
    ],
)
def test_columns_of_numbers_are_known(cell: str, is_number: bool) -> None:
    table = Table(("x",), [(cell,), ("1",)])
    assert table.is_numeric == [is_number]


def test_table_without_rows_has_its_header() -> None:
    table = Table(("a", "bc"), [])
    assert table.to_text() == "a  bc\n-  --"
    assert table.to_markdown() == "|   a |  bc |\n|----:|----:|"
    assert Cells(table.to_html()).rows == [[("a", "number"), ("bc", "number")]]
