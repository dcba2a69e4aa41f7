# SPDX-License-Identifier: Apache-2.0
"""The page and its Markdown: well formed, self-contained and complete."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nbl_modifier.report.blocks import Section, Text
from nbl_modifier.report.escaping import code
from nbl_modifier.report.page import render_html, render_markdown
from nbl_modifier.report.table import Table
from tests.report.pages import BASE, SECTIONS, Page, run
from tests.report.report_factory import write_checkpoint


def test_page_is_well_formed_and_loads_nothing(complete: Path, tmp_path: Path) -> None:
    page, _ = run(tmp_path / "r.html", complete)
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "//" not in text  # no URL of any scheme
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\([^#]", text)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


def test_figures_take_the_colours_of_the_theme(complete: Path, tmp_path: Path) -> None:
    run(tmp_path / "r.html", complete)
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "@media (prefers-color-scheme: dark)" in text
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    # matplotlib's own black and white may only stand where nothing is drawn
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", figures))
    assert fixed <= {"#000000", "#ffffff"}
    for name in re.findall(r"var\((--\w+)\)", figures):
        assert text.count(f"{name}:") == 2  # light and dark


def test_every_section_has_its_content(complete: Path, tmp_path: Path) -> None:
    page, markdown = run(tmp_path / "r.html", complete)
    assert list(page.rows) == SECTIONS
    assert re.findall(r"^### (.*)$", markdown, re.MULTILINE) == SECTIONS
    assert set(page.absent) == {"Quality of methods"}
    figures = {name: count for name, count in page.svgs.items() if count}
    assert figures == {
        "Ranking": 2,
        "Canonical correlations": 1,
        "Quality against speed": 4,
        "Quality against KV cache": 2,
    }


def test_two_base_models_share_a_page(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    write_checkpoint(tmp_path / "b", [2], model="another")
    page, markdown = run(tmp_path / "r.html", tmp_path)
    assert len(set(page.ids)) == len(page.ids)
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == ["another", BASE]


def test_tables_of_single_layers_are_folded(complete: Path, tmp_path: Path) -> None:
    _, markdown = run(tmp_path / "r.html", complete)
    html = (tmp_path / "r.html").read_text("utf-8")
    for text, heading in ((html, "<h3>{}</h3>"), (markdown, "### {}\n")):
        quality = text.index(heading.format("Quality"))
        for title in ("Ranking", "Layers chosen by each criterion"):
            start = text.index(heading.format(title))
            assert quality < start
            folded = text[start:].partition("<details>")[2].partition("</details>")[0]
            assert "rank" in folded or "criterion" in folded
            before = text[start:].partition("<details>")[0]
            assert "<table" not in before
            assert "|--" not in before
    assert "<summary>The numbers, 4 rows</summary>" in markdown


HOSTILE_NAMES = [
    'a<b>&"c"|d',
    "a*b*c_d_ _e_",
    "[link](http:\\x)",
    "![image](x)",
    "`code` ``two`` $math$ ~~gone~~",
    "# heading #",
    "- item",
    "1. item",
    "line\n\n# break",
    "\\* back",
    "&amp; <!-- no -->",
    "=== x",
]


class Words(HTMLParser):
    """The text of a page outside scripts and styles, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def shown(markdown: str) -> Words:
    """Return Markdown as a renderer that is not ours shows it."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return Words(renderer.render(markdown))


def page_of(name: str) -> list[tuple[str, list[Section]]]:
    """Return a report in which a name stands wherever one can."""
    table = Table((name, "x"), [(name, "1"), (name, "2")])
    return [(name, [Section(name, [Text(code(name)), table])])]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_are_shown_as_they_are(name: str) -> None:
    page = Page(render_html(name, page_of(name), "end"))
    assert page.rows[name] == [[name, "x"], [name, "1"], [name, "2"]]
    ours = shown(render_markdown(name, page_of(name), "end"))
    plain = shown(render_markdown("n", page_of("n"), "end"))
    assert ours.tags == plain.tags  # nothing in a name is markup
    words = name.split()
    assert ours.words == [*words * 5, "x", *words, "1", *words, "2", "end"]
