# SPDX-License-Identifier: Apache-2.0
"""Evaluations hold what was compared, and are read without what older ones lack."""

import json
from pathlib import Path

import pytest

from nbl_modifier.evaluation.comparison import Comparison, Row
from nbl_modifier.evaluation.scores import Score
from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME, EvaluationReport

GOLDEN = Path(__file__).parents[1] / "data" / "records" / EVALUATION_FILE_NAME


def row(task: str, base: float, compressed: float, stderr: float | None) -> Row:
    scores = (Score(base, stderr, True), Score(compressed, stderr, True))
    return Row(task, "acc", 5, 100, True, *scores)


def test_record_holds_the_comparison() -> None:
    comparison = Comparison((row("one", 0.5, 0.25, 0.01), row("two", 0.5, 0.5, 0.02)))
    one, two = comparison.metric_results()
    assert (one.task, one.metric, one.is_main) == ("one", "acc", True)
    assert (one.num_fewshot, one.num_documents) == (5, 100)
    assert (one.recovery, two.recovery) == (0.5, 1.0)
    assert (one.base_stderr, two.compressed_stderr) == (0.01, 0.02)
    assert one.recovery_stderr is None  # documents are not known
    average = comparison.average_result()
    assert average is not None
    assert (average.num_tasks, average.base, average.compressed) == (2, 0.5, 0.375)
    assert average.recovery == 0.75


def test_a_base_score_of_zero_has_no_recovery() -> None:
    (result,) = Comparison((row("one", 0.0, 0.25, 0.01),)).metric_results()
    assert result.recovery is None


def test_fewer_than_two_errors_have_no_average() -> None:
    rows = (row("one", 0.5, 0.25, 0.01), row("two", 0.5, 0.5, None))
    assert Comparison(rows).average_result() is None


def test_versions_and_time_may_be_missing() -> None:
    fields = json.loads(GOLDEN.read_text())
    del fields["versions"], fields["created"]
    report = EvaluationReport.from_json(json.dumps(fields))
    assert report.versions == {}
    assert report.created is None


def test_backends_are_those_there_are() -> None:
    fields = json.loads(GOLDEN.read_text()) | {"backend": "jax"}
    with pytest.raises(ValueError, match="backend: input should be 'hf' or 'vllm'"):
        EvaluationReport.from_json(json.dumps(fields))
