# SPDX-License-Identifier: Apache-2.0
"""The ranking as text: order, numbers, marks, alignment."""

import re

from nbl_modifier.report.tables import markdown_table, ranking_table
from tests.report.report_factory import make_report


def test_ranking_table_lists_layers_by_rank_and_marks_the_chosen() -> None:
    summary, _, _, _, *rows = ranking_table(make_report()).splitlines()
    assert "2 of 4 attention layers replaced" in summary
    assert "cca_bound" in summary
    cells = [row.split() for row in rows]
    assert [row[:2] for row in cells] == [
        ["1", "2"],
        ["2", "0"],
        ["3", "3"],
        ["4", "1"],
    ]
    assert [row[-1] == "yes" for row in cells] == [True, True, False, False]
    assert cells[0] == ["1", "2", "1.250", "0.1250", "0.01250", "4,096", "yes"]


def test_ranking_table_columns_are_right_aligned() -> None:
    _, _, *lines = ranking_table(make_report()).splitlines()
    # cells are two spaces apart, "residual NMSE" holds a single one
    ends = [[m.end() for m in re.finditer(r"\S+( \S+)*", line)][:6] for line in lines]
    assert len(ends) == 6
    assert all(row == ends[0] for row in ends)


def test_markdown_table_has_one_row_per_layer_and_bold_chosen_ones() -> None:
    header, rule, *rows = markdown_table(make_report()).splitlines()
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    assert len(rows) == 4
    assert rows[0].startswith("| 1 | **2** | 1.250 |")
    assert rows[2].startswith("| 3 | 3 | 4.000 |")
