# SPDX-License-Identifier: Apache-2.0
"""What ``nbl report`` writes, read again by the tests of this folder."""

import json
from html.parser import HTMLParser
from pathlib import Path

from nbl_modifier.cli import main
from nbl_modifier.records.compression import NBLReport
from tests.report.report_factory import (
    MODEL,
    write_benchmark,
    write_checkpoint,
    write_measurements,
)

BASE = MODEL
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


def write_everything(folder: Path) -> None:
    """Write all that a report can show, of one base model."""
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
    fields = json.loads(report.to_json()) | {"selected_layers": []}
    for layer in fields["layers"]:
        correlations = [1 - layer["index"] / 10 - (20 - i) / 100 for i in range(21)]
        layer["canonical_correlations"] = correlations
        layer["selected"] = False
    (folder / "ranking").mkdir()
    ranking = NBLReport.from_json(json.dumps(fields))
    ranking.save(folder / "ranking" / "nbl_ranking.json")
    accuracies = {
        BASE: {"piqa": 0.8, "arc": 0.6},
        str(folder / "nbl1"): {"piqa": 0.78, "arc": 0.57},
        str(folder / "nbl2"): {"piqa": 0.7, "arc": 0.5},
    }
    write_measurements(folder / "nbl_measurements.json", accuracies)
