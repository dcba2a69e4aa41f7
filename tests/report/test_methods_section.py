# SPDX-License-Identifier: Apache-2.0
"""Tables of methods: shown with their numbers and figures."""

import re
from pathlib import Path

from nbl_modifier.cli import main
from nbl_modifier.records.methods import METHODS_FILE_NAME
from nbl_modifier.report.blocks import FigureItem
from nbl_modifier.report.methods_section import drawings, methods_section
from nbl_modifier.report.table import Table
from tests.report.report_factory import (
    BEST,
    MODEL,
    REFERENCE,
    make_table,
    write_checkpoint,
)
from tests.report.report_factory import method_row as row


def test_section_has_the_numbers() -> None:
    items = list(methods_section([make_table()]))
    quality, numbers, layers = (item for item in items if isinstance(item, Table))
    assert quality.header == (
        *("m", "method", "c4, times base", f"c4, times {BEST}", "c4, loss avoided"),
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


def test_a_text_that_was_not_measured_has_empty_cells() -> None:
    rows = [row("base", 0, 1.0), row("later", 2, 1.5, texts={})]
    compared = next(
        item
        for item in methods_section([make_table(rows=rows)])
        if isinstance(item, Table)
    )
    assert compared.header[2] == "c4, times base"
    assert compared.rows[1][2:5] == ("", "", "")


def test_figures_are_there_when_their_numbers_are() -> None:
    assert set(drawings(make_table())) == {4, 6}
    base = [row("base", 0, 1.0)]
    assert drawings(make_table(rows=base)) == {}
    fast = row("fast", 2, 1.5, speed={"decode": (1.2, 0.1)})
    assert set(drawings(make_table(rows=[*base, fast]))) == {2, 4, 6}


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
