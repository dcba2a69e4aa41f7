# SPDX-License-Identifier: Apache-2.0
"""Figures of methods hold the numbers of their table."""

import pytest

from nbl_modifier.report.methods_section import drawings
from tests.report.report_factory import BEST, REFERENCE, make_table
from tests.report.report_factory import method_row as row


def test_lines_hold_the_numbers() -> None:
    figure = drawings(make_table())[4]()
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
    cache = drawings(make_table())[6]().axes[0]
    assert cache.xaxis_inverted()
    assert [t.get_text() for t in cache.get_xticklabels()] == ["50", "75", "100"]


def test_a_quality_missing_somewhere_leaves_a_gap() -> None:
    rows = [*make_table().rows, row("new", 2, 1.3, average=None, texts={})]
    figure = drawings(make_table(rows=rows))[4]()
    figure.canvas.draw()
    lines = {c.get_label(): c[0].get_xydata() for c in figure.axes[0].containers}
    assert len(lines["new"]) == 0


def test_what_is_far_off_does_not_press_the_rest_together() -> None:
    rows = [*make_table().rows, row("new", 2, 30.0)]
    ratio = drawings(make_table(rows=rows))[4]().axes[1]
    assert ratio.get_ylim()[1] == 5.0
    assert ratio.get_title(loc="left").endswith("times base, up to 5")
    whole = drawings(make_table())[4]().axes[1]
    assert "up to" not in whole.get_title(loc="left")
