# SPDX-License-Identifier: Apache-2.0
"""What one model scored on one task, with standard errors. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

_PREFERRED = ("acc_norm", "acc", "exact_match", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Score:
    """
    One metric of one model on one task.

    :param value: over all documents
    :param stderr: its standard error, documents taken as independent; None if unknown
    :param higher_is_better: False for perplexities
    :param influence: what each document adds to ``value`` to first order, summing to
        0; None where lm-eval's value is no ratio of sums over documents. Two models'
        errors on the same documents are correlated, and this is what shows it.
    """

    value: float
    stderr: float | None
    higher_is_better: bool
    influence: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """
    All metrics of one model on one task.

    :param task: name in lm-eval
    :param metric: the metric to compare models by
    :param num_fewshot: examples in the prompt
    :param num_documents: evaluated documents
    :param documents_hash: of documents, prompts and targets; models that differ in it
        were asked different questions
    :param scores: metric name to score; a filter other than none follows the metric's
        name after a comma, as in lm-eval
    """

    task: str
    metric: str
    num_fewshot: int
    num_documents: int
    documents_hash: str
    scores: dict[str, Score]

    @property
    def score(self) -> Score:
        """The score to compare models by."""
        return self.scores[self.metric]

    def to_fields(self) -> dict[str, Any]:
        """Return the scores as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """
        Return the scores that ``to_fields`` returned, after a round trip by JSON.

        :param fields: JSON types
        """
        scores = {}
        for name, entry in fields["scores"].items():
            influence = entry["influence"]
            tupled = None if influence is None else tuple(influence)
            scores[name] = Score(**{**entry, "influence": tupled})
        return cls(**{**fields, "scores": scores})


def ratio_score(
    numerators: Sequence[float],
    denominators: Sequence[float],
    metric: str,
    higher_is_better: bool,
) -> Score:
    """
    Return a metric that is a function of a ratio of sums, with its standard error.

    Accuracies are the ratio itself, with denominators of 1. ``bits_per_byte`` is
    ``-r / log(2)`` and perplexities are ``exp(-r)``, r being log-likelihood in nats per
    byte or word. The error is that of a ratio of means, by linearization; for
    accuracies it equals the sample standard deviation over sqrt(n).

    :param numerators: one per document
    :param denominators: one per document
    :param metric: name of the metric
    :param higher_is_better: False for perplexities
    """
    total = math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    value, slope = ratio, 1.0
    if metric == "bits_per_byte":
        value, slope = -ratio / math.log(2), -1 / math.log(2)
    elif metric.endswith("perplexity"):
        value = math.exp(-ratio)
        slope = -value
    influence = tuple(
        slope * (numerator - ratio * denominator) / total
        for numerator, denominator in zip(numerators, denominators, strict=True)
    )
    return Score(value, stderr_of_sum(influence), higher_is_better, influence)


def stderr_of_sum(influence: Sequence[float]) -> float | None:
    """
    Return the standard error of a sum of independent terms of mean zero.

    :param influence: one term per document
    :return: None for a single document
    """
    n = len(influence)
    if n < 2:
        return None
    return math.sqrt(math.fsum(u * u for u in influence) * n / (n - 1))


def pooled(stderrs: Sequence[float]) -> float:
    """
    Return the standard error of a mean over tasks, ``sqrt(sum se_i^2) / n``.

    :param stderrs: standard error of each task's score, tasks being independent
    """
    return math.sqrt(math.fsum(se * se for se in stderrs)) / len(stderrs)


def preferred_metric(scores: Sequence[str]) -> str:
    """
    Return the metric to compare models by where none was asked for.

    :param scores: names of metrics, each perhaps with a filter after a comma
    """
    for metric in _PREFERRED:
        for name in scores:
            if name.partition(",")[0] == metric:
                return name
    return scores[0]
