# SPDX-License-Identifier: Apache-2.0
"""What a compressed model keeps of its base model's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbl_modifier.records.evaluation import AverageResult, MetricResult

from .scores import Score, TaskScores, pooled, stderr_of_sum


@dataclass(frozen=True)
class Recovery:
    """
    A score over the base model's, as llm-compressor's tests define it.

    :param value: compressed over base, or base over compressed where lower is better;
        1 is no loss
    :param stderr: its standard error over documents, the two models compared in pairs;
        None where the documents' own scores are not known
    :param unpaired_stderr: the same with the two scores taken as independent, which
        is larger; None where a standard error is missing
    """

    value: float
    stderr: float | None
    unpaired_stderr: float | None


@dataclass(frozen=True)
class Row:
    """
    One metric of one task.

    :param task: name in lm-eval
    :param metric: name in lm-eval
    :param num_fewshot: examples in the prompt
    :param num_documents: evaluated documents
    :param is_main: whether it is the metric that the task is compared by
    :param base: the base model's score
    :param compressed: the compressed model's score
    """

    task: str
    metric: str
    num_fewshot: int
    num_documents: int
    is_main: bool
    base: Score
    compressed: Score

    @property
    def recovery(self) -> Recovery:
        """What is kept of the base model's score."""
        return recovery(self.base, self.compressed)


@dataclass(frozen=True)
class Average:
    """
    The mean over tasks of the metrics they are compared by, those where more is better.

    :param num_tasks: tasks it is over
    :param base: mean of the base model's scores
    :param base_stderr: its standard error, pooled over tasks
    :param compressed: mean of the compressed model's scores
    :param compressed_stderr: its standard error, pooled over tasks
    :param recovery: ``compressed / base``, errors pooled over tasks alike
    """

    num_tasks: int
    base: float
    base_stderr: float
    compressed: float
    compressed_stderr: float
    recovery: Recovery


@dataclass(frozen=True)
class Comparison:
    """
    Two models on the same tasks.

    :param rows: every metric that both have, task by task
    """

    rows: tuple[Row, ...]

    @property
    def average(self) -> Average | None:
        """
        The mean over tasks, None for fewer than two with a standard error.

        Tasks are independent, so variances of the scores, and the covariance of the
        two models' scores on each task, add up.
        """
        rows = [
            row
            for row in self.rows
            if row.is_main
            and row.base.higher_is_better
            and row.base.stderr is not None
            and row.compressed.stderr is not None
        ]
        if len(rows) < 2:
            return None
        base = math.fsum(row.base.value for row in rows) / len(rows)
        compressed = math.fsum(row.compressed.value for row in rows) / len(rows)
        base_stderr = pooled([row.base.stderr or 0.0 for row in rows])
        compressed_stderr = pooled([row.compressed.stderr or 0.0 for row in rows])
        ratio = compressed / base if base else math.nan
        # d(c/b) = (dc - ratio db) / b, for each document
        differences = [_paired(row.base, row.compressed, ratio) for row in rows]
        known = [each for each in differences if each is not None]
        return Average(
            num_tasks=len(rows),
            base=base,
            base_stderr=base_stderr,
            compressed=compressed,
            compressed_stderr=compressed_stderr,
            recovery=Recovery(
                ratio,
                pooled(known) / base if len(known) == len(rows) and base else None,
                math.hypot(compressed_stderr, ratio * base_stderr) / base
                if base
                else None,
            ),
        )

    def metric_results(self) -> list[MetricResult]:
        """Return the rows to write, without the documents' own scores."""
        return [
            MetricResult(
                task=row.task,
                metric=row.metric,
                is_main=row.is_main,
                higher_is_better=row.base.higher_is_better,
                num_fewshot=row.num_fewshot,
                num_documents=row.num_documents,
                base=row.base.value,
                base_stderr=row.base.stderr,
                compressed=row.compressed.value,
                compressed_stderr=row.compressed.stderr,
                **_recovery_fields(row.recovery),
            )
            for row in self.rows
        ]

    def average_result(self) -> AverageResult | None:
        """Return :attr:`average` to write."""
        average = self.average
        if average is None:
            return None
        return AverageResult(
            num_tasks=average.num_tasks,
            base=average.base,
            base_stderr=average.base_stderr,
            compressed=average.compressed,
            compressed_stderr=average.compressed_stderr,
            **_recovery_fields(average.recovery),
        )


def compare(
    base: Mapping[str, TaskScores], compressed: Mapping[str, TaskScores]
) -> Comparison:
    """
    Return both models' scores side by side.

    :param base: task to scores
    :param compressed: the same tasks
    :raises ValueError: if tasks, documents or shots differ
    """
    if base.keys() != compressed.keys():
        raise ValueError(
            f"compare: the tasks differ, {sorted(base)} and {sorted(compressed)}. "
            "Evaluate both models on the same tasks."
        )
    rows = []
    for task, ours in compressed.items():
        theirs = base[task]
        if theirs.documents_hash != ours.documents_hash:
            raise ValueError(
                f"compare: {task} was not the same for both models, "
                f"{theirs.num_documents} and {ours.num_documents} documents with "
                f"{theirs.num_fewshot} and {ours.num_fewshot} shots. Evaluate both "
                "with the same settings and versions."
            )
        rows += [
            Row(
                task,
                metric,
                ours.num_fewshot,
                ours.num_documents,
                metric == ours.metric,
                theirs.scores[metric],
                ours.scores[metric],
            )
            for metric in ours.scores
            if metric in theirs.scores
        ]
    return Comparison(tuple(rows))


def recovery(base: Score, compressed: Score) -> Recovery:
    """
    Return what ``compressed`` keeps of ``base``.

    :param base: the base model's score
    :param compressed: the compressed model's score on the same documents
    """
    over, under = (compressed, base) if base.higher_is_better else (base, compressed)
    if not over.value or not under.value:
        value = over.value / under.value if under.value else math.nan
        return Recovery(value, None, None)
    value = over.value / under.value
    # d(o/u) = (do - (o/u) du) / u, for each document
    paired = _paired(under, over, value)
    unpaired = (
        None
        if over.stderr is None or under.stderr is None
        else math.hypot(over.stderr, value * under.stderr) / under.value
    )
    return Recovery(value, None if paired is None else paired / under.value, unpaired)


def _paired(under: Score, over: Score, ratio: float) -> float | None:
    """Return the standard error of ``over - ratio * under`` on the same documents."""
    if under.influence is None or over.influence is None:
        return None
    pairs = zip(under.influence, over.influence, strict=True)
    return stderr_of_sum([o - ratio * u for u, o in pairs])


def _recovery_fields(each: Recovery) -> dict[str, float | None]:
    return {
        "recovery": each.value if math.isfinite(each.value) else None,
        "recovery_stderr": each.stderr,
        "recovery_unpaired_stderr": each.unpaired_stderr,
    }
