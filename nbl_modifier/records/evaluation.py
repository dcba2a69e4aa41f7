# SPDX-License-Identifier: Apache-2.0
"""The record of one ``nbl evaluate``, ``nbl_evaluation.json``."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from .record import CHECKED, Record

__all__ = [
    "EVALUATION_FILE_NAME",
    "AverageResult",
    "EvaluationReport",
    "MetricResult",
]

FORMAT_VERSION = 1
EVALUATION_FILE_NAME = "nbl_evaluation.json"


@dataclass(frozen=True, config=CHECKED)
class MetricResult:
    """
    One metric of one task, for both models.

    :param task: name in lm-eval
    :param metric: name in lm-eval, perhaps with a filter after a comma
    :param is_main: whether it is the metric that the task is compared by
    :param higher_is_better: False for perplexities
    :param num_fewshot: examples in the prompt
    :param num_documents: evaluated documents
    :param base: the base model's score
    :param base_stderr: standard error of ``base`` over documents, None if unknown
    :param compressed: the compressed model's score
    :param compressed_stderr: standard error of ``compressed``, None if unknown
    :param recovery: part of the base model's score that is kept, 1 is no loss; None if
        a score is 0
    :param recovery_stderr: standard error of ``recovery``, models compared in pairs;
        None where the documents' own scores are not known
    :param recovery_unpaired_stderr: the same with the scores taken as independent
    """

    task: str
    metric: str
    is_main: bool
    higher_is_better: bool
    num_fewshot: int
    num_documents: int
    base: float
    base_stderr: float | None
    compressed: float
    compressed_stderr: float | None
    recovery: float | None
    recovery_stderr: float | None
    recovery_unpaired_stderr: float | None


@dataclass(frozen=True, config=CHECKED)
class AverageResult:
    """
    The mean over tasks of the metrics they are compared by.

    :param num_tasks: tasks it is over
    :param base: mean of the base model's scores
    :param base_stderr: standard error of ``base``, pooled over tasks
    :param compressed: mean of the compressed model's scores
    :param compressed_stderr: standard error of ``compressed``, pooled over tasks
    :param recovery: ``compressed / base``, None if ``base`` is 0
    :param recovery_stderr: standard error of ``recovery``, models compared in pairs
    :param recovery_unpaired_stderr: the same with the scores taken as independent
    """

    num_tasks: int
    base: float
    base_stderr: float
    compressed: float
    compressed_stderr: float
    recovery: float | None
    recovery_stderr: float | None
    recovery_unpaired_stderr: float | None


@dataclass(frozen=True, config=CHECKED)
class EvaluationReport(Record):
    """
    Everything measured in one ``nbl evaluate``.

    :param format_version: version of this layout
    :param checkpoint: the compressed model, a directory or Hugging Face name
    :param baseline: the base model, a directory or Hugging Face name
    :param backend: what ran the models
    :param limit: documents of each task, None: all
    :param tasks: every metric that both models have, task by task
    :param average: over tasks; None for fewer than two with a standard error
    :param versions: package name to version
    :param created: UTC time, ISO 8601; None where it is not known
    """

    TITLE: ClassVar[str] = "an evaluation"
    REMEDY: ClassVar[str] = "Run nbl evaluate again."
    VERSION: ClassVar[int] = FORMAT_VERSION

    format_version: int
    checkpoint: str
    baseline: str
    backend: Literal["hf", "vllm"]
    limit: int | None
    tasks: list[MetricResult]
    average: AverageResult | None
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None
