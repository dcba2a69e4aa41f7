# SPDX-License-Identifier: Apache-2.0
"""A comparison as text. Standard library only."""

from __future__ import annotations

from .comparison import Comparison


def comparison_table(comparison: Comparison) -> str:
    """
    Return scores of both models as aligned text.

    :param comparison: of one checkpoint with its base model
    """
    cells = [
        ["task", "metric", "shots", "documents", "base", "compressed", "recovery"],
        *(
            [
                row.task if row.is_main else "",
                row.metric,
                str(row.num_fewshot) if row.is_main else "",
                f"{row.num_documents:,}" if row.is_main else "",
                _with_error(row.base.value, row.base.stderr),
                _with_error(row.compressed.value, row.compressed.stderr),
                _percent(row.recovery.value, row.recovery.stderr),
            ]
            for row in sorted(
                comparison.rows, key=lambda r: (_place(r.task, comparison), -r.is_main)
            )
        ),
    ]
    average = comparison.average
    if average is not None:
        cells.append(
            [
                f"average of {average.num_tasks}",
                "",
                "",
                "",
                _with_error(average.base, average.base_stderr),
                _with_error(average.compressed, average.compressed_stderr),
                _percent(average.recovery.value, average.recovery.stderr),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append(
        "\n+- one standard error over documents; recovery's compares the models in "
        "pairs,\nthe average's is pooled over tasks. Recovery is base / compressed "
        "where lower is better."
    )
    return "\n".join(lines)


def _place(task: str, comparison: Comparison) -> int:
    return [row.task for row in comparison.rows].index(task)


def _with_error(value: float, stderr: float | None) -> str:
    # word perplexities of small models have five digits before the point
    digits = 4 if value < 100 else 0
    return f"{value:,.{digits}f}" + (
        "" if stderr is None else f" +- {stderr:,.{digits}f}"
    )


def _percent(value: float, stderr: float | None) -> str:
    return f"{value:.1%}" + ("" if stderr is None else f" +- {stderr:.1%}")
