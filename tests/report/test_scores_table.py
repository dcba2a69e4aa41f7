# SPDX-License-Identifier: Apache-2.0
"""Scores side by side: every task, its main metric first, and the average."""

import dataclasses
from pathlib import Path

from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME, EvaluationReport
from nbl_modifier.report.scores_table import scores_table

GOLDEN = Path(__file__).parents[1] / "data" / "records"
REPORT = EvaluationReport.load(GOLDEN / EVALUATION_FILE_NAME)


def test_every_task_has_its_main_metric_first() -> None:
    table = scores_table(REPORT.tasks, REPORT.average)
    assert [row[:4] for row in table.rows] == [
        ("piqa", "acc_norm", "0", "4"),
        ("", "acc", "", ""),
        ("mmlu", "acc", "5", "500"),
        ("text", "bits_per_byte", "0", "500"),
        ("average of 2", "", "", ""),
    ]


def test_scores_have_their_errors_where_they_are_known() -> None:
    main, other, mmlu, text, average = scores_table(REPORT.tasks, REPORT.average).rows
    assert main[4:] == ("0.7500 +- 0.0100", "0.7000 +- 0.0200", "93.3% +- 0.3%")
    assert other[-1] == "85.7%"
    assert mmlu[-1] == ""  # of a base model that scores 0, nothing is a share
    assert text[4:] == ("1.2500", "1.5000", "83.3%")
    assert average[4:] == ("0.3750 +- 0.0071", "0.6000 +- 0.0112", "160.0%")


def test_lines_are_of_one_length() -> None:
    both = [
        dataclasses.replace(row, recovery=1.0, recovery_stderr=0.0)
        for row in REPORT.tasks
    ]
    lines = scores_table(both, None).to_text().splitlines()
    assert lines[0].split()[:2] == ["task", "metric"]
    assert all(line.endswith("100.0% +- 0.0%") for line in lines[2:])
    assert len({len(line) for line in lines[2:]}) == 1


def test_large_perplexities_have_no_decimals() -> None:
    (row, *_) = REPORT.tasks
    wide = dataclasses.replace(row, base=12345.678, base_stderr=234.5)
    assert scores_table([wide], None).rows[0][4] == "12,346 +- 234"
