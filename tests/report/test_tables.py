# SPDX-License-Identifier: Apache-2.0
"""The ranking as text: order, numbers, marks, alignment."""

import dataclasses
import re

from nbl_modifier.records.compression import HeldoutResult
from nbl_modifier.report.tables import layers_table, ranking_table
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
    header, rule, *rows = layers_table(make_report()).to_markdown().splitlines()
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    assert len(rows) == 4
    assert rows[0].startswith("|    1 | **2** | 1.250 |")
    assert rows[2].startswith("|    3 |     3 | 4.000 |")


def test_what_was_measured_on_held_out_windows_is_shown() -> None:
    report = make_report()
    layers = [
        dataclasses.replace(layer, loss=0.25, heldout_nmse=0.5)
        for layer in report.layers[:-1]
    ] + report.layers[-1:]
    heldout = HeldoutResult(8, 1000, base=10.0, path=[None], replaced=12.0)
    report = dataclasses.replace(report, layers=layers, heldout=heldout)
    _, perplexity, _, header, _, *rows = ranking_table(report).splitlines()
    assert perplexity == (
        "perplexity on 8 held-out windows (1,000 tokens): 10.000 before, 12.000 after "
        "(+20.00%)"
    )
    assert "held-out NMSE" in header
    assert sum("+0.2500" in row for row in rows) == len(rows) - 1
    heldout = dataclasses.replace(heldout, refitted=11.0, distilled=10.5)
    report = dataclasses.replace(
        report, heldout=heldout, refit=True, distill_epochs=4, selection="greedy"
    )
    summary, perplexity, *_ = ranking_table(report).splitlines()
    assert "replaced, refitted, distilled, ranked by cca_bound, greedily" in summary
    assert perplexity.endswith("11.000 refitted (+10.00%), 10.500 distilled (+5.00%)")
