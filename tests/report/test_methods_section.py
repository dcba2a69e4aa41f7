# SPDX-License-Identifier: Apache-2.0
"""Tables of methods: read as written, and shown with their numbers and figures."""

import json
import re
from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.report.blocks import FigureItem, Table
from nbl_modifier.report.methods_section import figures, methods_section
from nbl_modifier.report.methods_table import (
    METHODS_FILE_NAME,
    MethodRow,
    MethodsTable,
    TextResult,
)
from tests.report.report_factory import write_checkpoint

MODEL = "some-organization/some-model"
BEST, REFERENCE = "best $x$", "ref"


def row(method: str, m: int, ratio: float, **changes: object) -> MethodRow:
    text = TextResult((20 * ratio, 0.5), (ratio, 0.01), (ratio / 1.1, 0.02), (0.5, 0.1))
    fields = {
        "method": method,
        "m": m,
        "layers": list(range(m)),
        "num_parameters": 1_000_000,
        "kv_cache": (8 - m) / 8,
        "texts": {"c4": text},
        "tasks": {"piqa": (0.5, 0.02), "boolq": (0.75, 0.01)},
        "average": (0.6 / ratio, 0.011),
    }
    return MethodRow(**{**fields, **changes})  # type: ignore[arg-type]


def make_table(**changes: object) -> MethodsTable:
    rows = [
        row("base", 0, 1.0),
        *(row(BEST, m, 1 + m / 20) for m in (2, 4)),
        *(row(REFERENCE, m, 1 + m / 10, facts=(7, 9)) for m in (2, 4)),
    ]
    fields = {
        "model": MODEL,
        "num_layers": 8,
        "reference": REFERENCE,
        "best": BEST,
        "calibrated_on": "much text",
        "measured_on": "other text",
        "rows": rows,
        "versions": {"torch": "1"},
        "created": "2026-01-02T03:04:05+00:00",
    }
    return MethodsTable(**{**fields, **changes})  # type: ignore[arg-type]


def test_file_holds_the_table(tmp_path: Path) -> None:
    speed = {"decode": (1.2, 0.1)}
    rows = [*make_table().rows, row("fast", 2, 1.5, speed=speed, average=None)]
    table = make_table(rows=rows)
    table.save(tmp_path / METHODS_FILE_NAME)
    assert MethodsTable.load(tmp_path / METHODS_FILE_NAME) == table


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("format_version"),
        lambda fields: fields.update(format_version=2),
        lambda fields: fields.pop("rows"),
        lambda fields: fields.update(rows=[{"method": "x"}]),
        lambda fields: fields.update(unknown=1),
        lambda fields: fields["rows"][0]["texts"]["c4"].update(perplexity=None),
        lambda fields: fields["rows"][0]["tasks"].update(piqa=[1, 2, 3]),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / METHODS_FILE_NAME
    make_table().save(path)
    fields = json.loads(path.read_text())
    damage(fields)  # type: ignore[operator]
    path.write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=f"{METHODS_FILE_NAME}: not a table of methods"
    ):
        MethodsTable.load(path)


def test_section_has_the_numbers() -> None:
    items = list(methods_section([make_table()]))
    quality, numbers, layers = (item for item in items if isinstance(item, Table))
    assert quality.header == (
        *("m", "method", "c4, times base", f"c4, times {BEST}", "c4, recovered"),
        *("accuracy", "facts", "KV cache", "parameters"),
    )
    assert quality.rows[1] == (
        *("2", BEST, "1.1000 ± 0.0100", "1.0000 ± 0.0200", "50.0 ± 10.0%"),
        *("0.5455 ± 0.0110", "", "75.0%", "1,000,000"),
    )
    assert quality.marked == {1, 2}
    assert all(quality.is_numeric[2:])
    assert not quality.is_detail
    assert numbers.is_detail
    assert numbers.header[2:] == ("c4, perplexity", "piqa", "boolq")
    assert layers.is_detail
    assert layers.rows[-1][:3] == ("4", REFERENCE, "0 1 2 3")
    assert sum(isinstance(item, FigureItem) for item in items) == 2


def test_figures_are_there_when_their_numbers_are() -> None:
    assert set(figures(make_table())) == {4, 6}
    base = [row("base", 0, 1.0)]
    assert figures(make_table(rows=base)) == {}
    fast = row("fast", 2, 1.5, speed={"decode": (1.2, 0.1)})
    assert set(figures(make_table(rows=[*base, fast]))) == {2, 4, 6}


def test_lines_hold_the_numbers() -> None:
    figure = figures(make_table())[4]()
    accuracy, ratio = figure.axes
    for axes, expected in (
        (accuracy, {2: 0.6 / 1.2, 4: 0.6 / 1.4}),
        (ratio, {2: 1.2, 4: 1.4}),
    ):
        lines = {c.get_label(): c[0].get_xydata().tolist() for c in axes.containers}
        assert lines[REFERENCE] == [pytest.approx(point) for point in expected.items()]
        assert set(lines) == {BEST, REFERENCE}
    assert ratio.get_yscale() == "log"
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [BEST, REFERENCE, "base"]
    cache = figures(make_table())[6]().axes[0]
    assert cache.xaxis_inverted()
    assert [t.get_text() for t in cache.get_xticklabels()] == ["50", "75", "100"]


def test_a_quality_missing_somewhere_leaves_a_gap() -> None:
    rows = [*make_table().rows, row("new", 2, 1.3, average=None, texts={})]
    figure = figures(make_table(rows=rows))[4]()
    figure.canvas.draw()
    lines = {c.get_label(): c[0].get_xydata() for c in figure.axes[0].containers}
    assert len(lines["new"]) == 0


def test_report_shows_it_first(tmp_path: Path) -> None:
    make_table().save(tmp_path / METHODS_FILE_NAME)
    write_checkpoint(tmp_path / "nbl", [2], model=MODEL)
    page = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--output", str(page)]) == 0
    html = page.read_text("utf-8")
    titles = re.findall("<h3>(.*?)</h3>", html)
    assert titles[:2] == ["Quality", "Quality of methods"]
    assert "1.1000 ± 0.0100" in html
    # both figures, each line in a colour of the theme, and the name no formula
    assert html.count("var(--series1)") >= 2
    assert BEST in html
    markdown = page.with_suffix(".md").read_text("utf-8")
    assert "1.1000 ± 0.0100" in markdown
