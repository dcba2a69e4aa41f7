# SPDX-License-Identifier: Apache-2.0
"""
The page and its Markdown: well formed, self-contained, complete, and with the numbers
of the JSON files.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.report.blocks import Section, Table, Text, code
from nbl_modifier.report.html_page import render_html
from nbl_modifier.report.markdown import aligned_table, render_markdown
from tests.report.report_factory import (
    BOUNDS,
    write_benchmark,
    write_checkpoint,
    write_measurements,
)

BASE = "some-organization/some-model"
SECTIONS = [
    "Quality",
    "Quality of methods",
    "Quality against speed",
    "Quality against KV cache",
    "Speed",
    "KV-cache size",
    "Checkpoints",
    "Ranking",
    "Layers chosen by each criterion",
    "Canonical correlations",
    "How it was made",
]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A page as sections of paragraphs and table rows; refuses unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.marked: dict[str, list[int]] = {}
        self.absent: dict[str, str] = {}
        self.svgs: dict[str, int] = {}
        self._title, self._text, self._is_absent = "", "", False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [v for k, v in attrs if v and k in ("href", "src", "xlink:href")]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)
        self._text = "" if tag in ("h3", "th", "td", "p") else self._text
        if tag == "tr":
            self.rows[self._title].append([])
            if values.get("class") == "marked":
                self.marked[self._title].append(len(self.rows[self._title]) - 1)
        if tag == "svg":
            self.svgs[self._title] += 1
        if tag == "p":
            self._is_absent = values.get("class") == "absent"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "h3":
            self._title = self._text
            self.rows[self._title], self.marked[self._title] = [], []
            self.svgs[self._title] = 0
        elif tag in ("th", "td"):
            self.rows[self._title][-1].append(self._text)
        elif tag == "p" and self._is_absent:
            self.absent[self._title] = self._text


def run(output: Path, *paths: Path) -> tuple[Page, str]:
    """Return what ``nbl report`` wrote, as page and as Markdown."""
    assert main(["report", *map(str, paths), "--output", str(output)]) == 0
    return Page(output.read_text("utf-8")), output.with_suffix(".md").read_text("utf-8")


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A folder with everything a report can show."""
    folder = tmp_path / "out"
    evaluation = {
        "perplexity base": 10.0,
        "perplexity saved checkpoint": 10.5,
        "perplexity times base": 1.05,
        "perplexity times base, standard error": 0.0125,
    }
    for name, selected in {"nbl1": [2], "nbl2": [0, 2]}.items():
        write_checkpoint(folder / name, selected, evaluation=evaluation)
        write_benchmark(folder / name / "nbl_benchmark.json", BASE, str(folder / name))
    report = NBLReport.load(folder / "nbl2" / "nbl_report.json")
    fields = json.loads(report.to_json())
    for layer in fields["layers"]:
        correlations = [1 - layer["index"] / 10 - (20 - i) / 100 for i in range(21)]
        layer["canonical_correlations"] = correlations
    NBLReport.from_json(json.dumps(fields)).save(folder / "nbl2" / "nbl_report.json")
    accuracies = {
        BASE: {"piqa": 0.8, "arc": 0.6},
        str(folder / "nbl1"): {"piqa": 0.78, "arc": 0.57},
        str(folder / "nbl2"): {"piqa": 0.7, "arc": 0.5},
    }
    write_measurements(folder / "nbl_measurements.json", accuracies)
    return folder


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
    # correlations are those of nbl2 only
    assert set(page.absent) == {"Quality of methods", "Canonical correlations"}
    figures = {name: count for name, count in page.svgs.items() if count}
    assert figures == {
        "Ranking": 2,
        "Canonical correlations": 1,
        "Quality against speed": 4,
        "Quality against KV cache": 2,
    }


def test_numbers_are_those_of_the_files(complete: Path, tmp_path: Path) -> None:
    page, markdown = run(tmp_path / "r.html", complete)
    report = NBLReport.load(complete / "nbl2" / "nbl_report.json")
    rows = [row for row in page.rows["Ranking"] if row[0] != "rank"][4:]
    assert [(int(r[0]), int(r[1])) for r in rows] == [(1, 2), (2, 0), (3, 3), (4, 1)]
    for row, layer in zip(rows, report.ranking, strict=True):
        assert [float(cell) for cell in row[2:6]] == pytest.approx(
            [layer.cca_bound, layer.nmse, layer.residual_nmse, layer.score], abs=5e-4
        )
    assert page.marked["Ranking"] == [1, 6, 7]
    assert page.rows["Quality"] == [
        ["model", "held-out perplexity, times base", "piqa", "arc"],
        ["some-model", "1.0000", "0.8000 ± 0.0100", "0.6000 ± 0.0100"],
        ["nbl1", "1.0500 ± 0.0125", "0.7800 ± 0.0100", "0.5700 ± 0.0100"],
        ["nbl2", "1.0500 ± 0.0125", "0.7000 ± 0.0100", "0.5000 ± 0.0100"],
    ]
    # The mean of two tasks; its error is sqrt(2) x 0.01 / 2.
    header, *rows = page.rows["Quality against KV cache"]
    assert header[1:] == [
        "KV cache, times base",
        "mean accuracy over 2 tasks",
    ]
    assert rows[:3] == [
        ["some-model", "1.0000", "0.7000 ± 0.0071"],
        ["nbl1", "0.7500", "0.6750 ± 0.0071"],
        ["nbl2", "0.5000", "0.6000 ± 0.0071"],
    ]
    assert rows[4:] == [
        ["some-model", "1.0000", "1.0000"],
        ["nbl1", "0.7500", "1.0500 ± 0.0125"],
        ["nbl2", "0.5000", "1.0500 ± 0.0125"],
    ]
    assert page.rows["Quality against speed"][1:4] == [
        ["some-model", "1.0000", "0.7000 ± 0.0071"],
        ["nbl1", "1.2500 ± 0.0500", "0.6750 ± 0.0071"],
        ["nbl2", "1.2500 ± 0.0500", "0.6000 ± 0.0071"],
    ]
    assert page.rows["Speed"][1] == [
        "prefill, 8 x 512 tokens, vllm",
        *["1.2500 ± 0.0500"] * 2,
    ]
    assert page.rows["Canonical correlations"][1] == [
        *("0", "0.80000", "0.81000", "0.85000", "0.90000", "0.95000", "1.00000")
    ]
    # keys and values: 2 x 2 heads x 64 x 2 bytes = 512 bytes per layer and token
    header, first, *_ = page.rows["KV-cache size"]
    assert header == ["batch", "context", "base", "nbl1", "nbl2"]
    assert first == ["1", "512", "1 MiB", "768 KiB", "512 KiB"]
    in_text = [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("| ")
    ]
    assert in_text == [row for section in page.rows.values() for row in section]


def test_each_criterion_has_its_layers(complete: Path, tmp_path: Path) -> None:
    page, _ = run(tmp_path / "r.html", complete / "nbl2")
    order = ", ".join(map(str, sorted(BOUNDS, key=BOUNDS.__getitem__)))
    assert page.rows["Layers chosen by each criterion"][1:] == [
        [name, "0, 2", "2 of 2", order]
        for name in ("cca_bound", "nmse", "residual_nmse")
    ]
    assert page.marked["Layers chosen by each criterion"] == [1]


def test_absent_sections_say_why(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "nbl", [2], evaluation=None)
    (tmp_path / "nbl" / "config.json").unlink()
    page, markdown = run(tmp_path / "r.html", tmp_path / "nbl")
    reasons = {
        "Canonical correlations": "canonical_correlations: true",
        "Quality": "No quality was measured",
        "Quality of methods": "benchmarks/paper_table.py",
        "Quality against speed": "nbl_benchmark.json",
        "Quality against KV cache": "no quality was measured on two models",
        "Speed": "nbl_benchmark.json",
        "KV-cache size": "no config.json",
    }
    assert page.absent.keys() == reasons.keys()
    for title, reason in reasons.items():
        assert reason in page.absent[title]
        assert reason in markdown


def test_measurements_alone_make_a_page(tmp_path: Path) -> None:
    path = tmp_path / "nbl_measurements.json"
    write_measurements(path, {BASE: {"piqa": 0.8}, "other": {"piqa": 0.7}})
    page, _ = run(tmp_path / "r.html", path)
    assert "nbl_report.json" in page.absent["Checkpoints"]
    assert len(page.rows["Quality"]) == 3


def test_what_was_measured_in_addition_has_its_column(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    path = tmp_path / "a" / "nbl_report.json"
    fields = json.loads(path.read_text())
    for layer in fields["layers"]:
        layer |= {"cosine": 0.25, "loss": 0.5 if layer["index"] == 2 else None}
    path.write_text(json.dumps(fields))
    page, _ = run(tmp_path / "r.html", tmp_path)
    header, *rows = page.rows["Ranking"]
    assert header[5:] == ["cosine", "loss", "score", "replaced"]
    assert [row[5:7] for row in rows] == [
        ["0.25000", "0.50000"],
        *[["0.25000", ""]] * 3,
    ]
    criteria = [row[0] for row in page.rows["Layers chosen by each criterion"][1:]]
    assert criteria == ["cca_bound", "nmse", "residual_nmse", "cosine"]


def test_departures_from_the_paper_are_named(tmp_path: Path) -> None:
    fields = {"criterion": "loss", "selection": "greedy", "refit": True}
    write_checkpoint(tmp_path / "a", [2])
    write_checkpoint(tmp_path / "b", [0, 2], **fields)
    page, _ = run(tmp_path / "r.html", tmp_path)
    criteria = [row[3] for row in page.rows["Checkpoints"][1:]]
    assert criteria == ["cca_bound", "loss, greedy, refit"]


def test_same_ranking_is_said_once(tmp_path: Path) -> None:
    for name in ("dense", "quantized"):
        write_checkpoint(tmp_path / name, [2])
    page, markdown = run(tmp_path / "r.html", tmp_path)
    assert page.svgs["Ranking"] == 1
    assert "`quantized`: the same as `dense`." in markdown


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


def test_markdown_columns_are_aligned() -> None:
    rows = [("a", "9.5", "1, 2"), ("long name", "10.25 ± 0.50", "3")]
    text = aligned_table(Table(("model", "value", "layers"), rows, frozenset({1})))
    header, rule, *lines = text.splitlines()
    assert len({len(line) for line in text.splitlines()}) == 1
    assert re.fullmatch(r"\|-+\|-+:\|-+\|", rule)
    assert header.startswith("| model")
    assert lines[0].split("|")[2].endswith(" 9.5 ")
    assert lines[1].startswith("| **long name** |")


@pytest.mark.parametrize(
    ("output", "message"),
    [("report.txt", "must end in .html"), ("no/such/report.html", "no folder")],
)
def test_bad_output_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    assert main(["report", "nowhere", "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err
