# SPDX-License-Identifier: Apache-2.0
"""
Measured qualities and speeds of models, whichever program measured them.

Four kinds of JSON files are read: ``nbl_report.json`` (the
held-out perplexity of ``nbl compress``), ``nbl_evaluation.json``,
``nbl_benchmark.json``, and ``nbl_measurements.json``, which other programs can write::

    {"format_version": 1,
     "measurements": [
       {"model": "out/nbl4", "baseline": "base",
        "metrics": {"piqa": {"value": 0.81, "standard_error": 0.009,
                             "kind": "accuracy"}}}]}

``baseline`` is null for the base model itself, ``standard_error`` is null where none is
known, and ``kind`` is one of :data:`KINDS`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator
from pydantic.dataclasses import dataclass

from .compression import NBLReport
from .evaluation import EvaluationReport
from .record import OPEN, Record
from .speed import SpeedReport

__all__ = [
    "KINDS",
    "MEASUREMENTS_FILE_NAME",
    "PERPLEXITY_RATIO",
    "PERPLEXITY_RATIO_ERROR",
    "Measurement",
    "Metric",
    "benchmark_measurements",
    "evaluation_measurements",
    "load_measurements",
    "mean_accuracy",
    "report_measurements",
]

FORMAT_VERSION = 1
MEASUREMENTS_FILE_NAME = "nbl_measurements.json"
#: Names in ``NBLReport.evaluation``: of the last step, and its standard error.
PERPLEXITY_RATIO = "perplexity times base"
PERPLEXITY_RATIO_ERROR = "perplexity times base, standard error"
Kind = Literal["accuracy", "perplexity_ratio", "bits_per_byte", "score", "speed_ratio"]
#: What a metric is, with its unit.
KINDS: dict[Kind, str] = {
    "accuracy": "fraction of the questions answered right",
    "perplexity_ratio": "perplexity over the base model's",
    "bits_per_byte": "bits per byte of text",
    "score": "as lm-eval defines it",
    "speed_ratio": "tokens per second over the base model's",
}


@dataclass(frozen=True, config=OPEN)
class Metric:
    """
    One number with what is known about its precision.

    :param value: in the unit of ``kind``, finite
    :param standard_error: of ``value``, at least 0, or None where none is known
    :param kind: one of :data:`KINDS`
    """

    value: FiniteFloat
    standard_error: Annotated[FiniteFloat, Field(ge=0)] | None
    kind: Kind

    @model_validator(mode="before")
    @classmethod
    def _unknown_error(cls, given: Any) -> Any:
        """Take a file that leaves the standard error out for one that has null."""
        return {"standard_error": None, **given} if isinstance(given, dict) else given


@dataclass(frozen=True, config=OPEN)
class Measurement:
    """
    What was measured on one model.

    :param model: directory or Hugging Face name
    :param baseline: the base model it is compared with, None for a base model
    :param metrics: by name, such as the task's
    :param created: when, UTC time, ISO 8601; None where it is not known
    """

    model: str
    baseline: str | None
    metrics: dict[str, Metric]
    created: str | None = None


@dataclass(frozen=True, config=OPEN)
class MeasurementsFile(Record):
    """
    An ``nbl_measurements.json``.

    :param format_version: version of this layout
    :param measurements: by any program
    """

    TITLE: ClassVar[str] = "a file of measurements"
    REMEDY: ClassVar[str] = "See docs/report.md for its form."
    VERSION: ClassVar[int] = FORMAT_VERSION

    format_version: int
    measurements: list[Measurement]


def load_measurements(path: Path) -> list[Measurement]:
    """
    Return the content of an ``nbl_measurements.json``.

    :param path: the file
    :raises ValueError: if it is not one; the message names the file and the entry
    """
    return MeasurementsFile.load(path).measurements


def evaluation_measurements(path: Path) -> list[Measurement]:
    """
    Return the scores of an ``nbl_evaluation.json``, one metric per task.

    :param path: the file
    :raises ValueError: if it is not one; the message names the file
    """
    report = EvaluationReport.load(path)
    base: dict[str, Metric] = {}
    compressed: dict[str, Metric] = {}
    for row in (row for row in report.tasks if row.is_main):
        name = f"{row.task} {row.metric} ({report.backend})"
        kind = _kind(row.metric)
        base[name] = Metric(row.base, row.base_stderr, kind)
        compressed[name] = Metric(row.compressed, row.compressed_stderr, kind)
    return [
        Measurement(report.baseline, None, base),
        Measurement(report.checkpoint, report.baseline, compressed, report.created),
    ]


def _kind(metric: str) -> Kind:
    """Return the kind of a metric of lm-eval, whose filter follows a comma."""
    name = metric.partition(",")[0]
    if name.startswith("acc") or name == "exact_match":
        return "accuracy"
    return "bits_per_byte" if name == "bits_per_byte" else "score"


def benchmark_measurements(path: Path) -> list[Measurement]:
    """
    Return the speeds of an ``nbl_benchmark.json``, one metric per phase and grid point.

    The two models are measured in turn, round by round, so each round gives a ratio:
    the value is their mean, its standard error that of the mean over rounds.

    :param path: the file
    :raises ValueError: if it is not one; the message names the file
    """
    report = SpeedReport.load(path)
    metrics = {
        f"{row.phase}, {row.batch} x {row.context:,} tokens, {report.engine}": Metric(
            statistics.fmean(row.ratios), _standard_error(row.ratios), "speed_ratio"
        )
        for row in report.rows
    }
    # by definition, so that the base model has its place in the figures
    same = dict.fromkeys(metrics, Metric(1.0, 0.0, "speed_ratio"))
    base, compressed = report.base.name, report.compressed.name
    return [
        Measurement(base, None, same),
        Measurement(compressed, base, metrics, report.created),
    ]


def _standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean, None of a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def report_measurements(model: str, report: NBLReport) -> list[Measurement]:
    """
    Return the perplexity that a report holds, as a ratio to the base model's.

    :param model: the checkpoint that the report lies in
    :param report: of that checkpoint
    :return: base model and checkpoint; nothing where perplexity was not measured
    """
    figures = report.evaluation or {}
    if PERPLEXITY_RATIO not in figures:
        return []
    ratio, error = figures[PERPLEXITY_RATIO], figures.get(PERPLEXITY_RATIO_ERROR)
    name = "held-out perplexity, times base"
    own = Metric(ratio, error, "perplexity_ratio")
    return [
        Measurement(report.model, None, {name: Metric(1.0, 0.0, "perplexity_ratio")}),
        Measurement(model, report.model, {name: own}),
    ]


def mean_accuracy(metrics: Mapping[str, Metric]) -> Metric:
    """
    Return the mean of accuracies and its standard error, tasks taken as independent.

    ``sqrt(sum_i se_i^2) / n``, as in arXiv:2505.21077, E.3.

    :param metrics: accuracies by task, at least one
    :return: with a standard error if each of them has one
    """
    values = [metric.value for metric in metrics.values()]
    errors = [metric.standard_error for metric in metrics.values()]
    known = [error for error in errors if error is not None]
    error = (
        math.sqrt(sum(error**2 for error in known)) / len(errors)
        if len(known) == len(errors)
        else None
    )
    return Metric(statistics.fmean(values), error, "accuracy")
