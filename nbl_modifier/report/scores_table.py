# SPDX-License-Identifier: Apache-2.0
"""The scores of two models side by side."""

from __future__ import annotations

from collections.abc import Sequence

from nbl_modifier.records.evaluation import AverageResult, MetricResult

from .table import Table

__all__ = ["SCORES_NOTE", "scores_table"]

#: What stands below the table.
SCORES_NOTE = (
    "+- one standard error over documents; recovery's compares the models in pairs,\n"
    "the average's is pooled over tasks. Recovery is base / compressed where lower is "
    "better."
)
_HEADER = ("task", "metric", "shots", "documents", "base", "compressed", "recovery")


def scores_table(
    metrics: Sequence[MetricResult], average: AverageResult | None
) -> Table:
    """
    Return the scores of both models, each task's main metric first.

    :param metrics: of the tasks, as they were evaluated
    :param average: over tasks, the last row
    """
    tasks = list(dict.fromkeys(row.task for row in metrics))
    rows = [
        (
            row.task if row.is_main else "",
            row.metric,
            str(row.num_fewshot) if row.is_main else "",
            f"{row.num_documents:,}" if row.is_main else "",
            *_scores(row),
        )
        for row in sorted(metrics, key=lambda r: (tasks.index(r.task), -r.is_main))
    ]
    if average is not None:
        rows.append((f"average of {average.num_tasks}", "", "", "", *_scores(average)))
    return Table(_HEADER, rows)


def _scores(row: MetricResult | AverageResult) -> tuple[str, str, str]:
    return (
        _with_error(row.base, row.base_stderr),
        _with_error(row.compressed, row.compressed_stderr),
        _percent(row.recovery, row.recovery_stderr),
    )


def _with_error(value: float, stderr: float | None) -> str:
    # word perplexities of small models have five digits before the point
    digits = 4 if value < 100 else 0
    return f"{value:,.{digits}f}" + (
        "" if stderr is None else f" +- {stderr:,.{digits}f}"
    )


def _percent(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" + ("" if stderr is None else f" +- {stderr:.1%}")
