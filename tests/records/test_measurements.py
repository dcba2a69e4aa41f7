# SPDX-License-Identifier: Apache-2.0
"""Measurements keep their numbers and errors, and bad files are named."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.evaluation.comparison import Comparison, Row
from nbl_modifier.evaluation.scores import Score
from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME, EvaluationReport
from nbl_modifier.records.measurements import (
    Measurement,
    Metric,
    benchmark_measurements,
    evaluation_measurements,
    load_measurements,
    mean_accuracy,
    report_measurements,
)
from tests.report.report_factory import make_report, write_benchmark, write_measurements


def test_file_is_read_as_it_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "nbl_measurements.json"
    write_measurements(path, {"base": {"piqa": 0.75}, "out/nbl4": {"piqa": 0.5}})
    assert load_measurements(path) == [
        Measurement("base", None, {"piqa": Metric(0.75, 0.01, "accuracy")}),
        Measurement("out/nbl4", "base", {"piqa": Metric(0.5, 0.01, "accuracy")}),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "speed"}, "kind: input should be 'accuracy', .* got 'speed'"),
        ({"value": math.nan}, "value: input should be a finite number, got nan"),
        ({"standard_error": -1.0}, "standard_error: .* greater than or equal to 0"),
        ({"value": None}, "value: input should be a valid number, got None"),
    ],
)
def test_bad_metric_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    metric = {"value": 0.5, "standard_error": 0.1, "kind": "accuracy"} | change
    entry = {"model": "m", "baseline": None, "metrics": {"piqa": metric}}
    path = tmp_path / "nbl_measurements.json"
    path.write_text(json.dumps({"format_version": 1, "measurements": [entry]}))
    with pytest.raises(ValueError, match=message) as caught:
        load_measurements(path)
    said = str(caught.value)
    assert said.startswith(
        f"{path}: not a file of measurements: measurements.0.metrics"
    )
    assert said.endswith("See docs/report.md for its form.")


def test_standard_error_may_be_left_out(tmp_path: Path) -> None:
    metrics = {"piqa": {"value": 1, "kind": "accuracy"}}
    entry = {"model": "m", "baseline": None, "metrics": metrics}
    path = tmp_path / "nbl_measurements.json"
    path.write_text(json.dumps({"format_version": 1, "measurements": [entry]}))
    (measured,) = load_measurements(path)
    assert measured.metrics == {"piqa": Metric(1.0, None, "accuracy")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", r"format_version, got \[\]"),
        ('{"format_version": 2}', "format_version is 2"),
        ('{"format_version": 1}', "measurements: field required"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "nbl_measurements.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_measurements(path)


def test_evaluation_has_one_metric_per_task(tmp_path: Path) -> None:
    """As ``nbl evaluate`` writes it."""

    def row(task: str, metric: str, value: float, is_main: bool = True) -> Row:
        base, compressed = Score(0.75, 0.01, True), Score(value, None, True)
        return Row(task, metric, 0, 500, is_main, base, compressed)

    rows = (
        row("piqa", "acc", 0.1, is_main=False),
        row("piqa", "acc_norm", 0.5),
        row("text", "bits_per_byte", 1.5),
        row("gen", "f1,none", 0.25),
    )
    comparison = Comparison(rows)
    path = tmp_path / EVALUATION_FILE_NAME
    EvaluationReport(
        format_version=1,
        checkpoint="out",
        baseline="base",
        backend="hf",
        limit=None,
        tasks=comparison.metric_results(),
        average=comparison.average_result(),
    ).save(path)
    base, compressed = evaluation_measurements(path)
    assert (base.model, base.baseline) == ("base", None)
    assert base.metrics["piqa acc_norm (hf)"] == Metric(0.75, 0.01, "accuracy")
    assert (compressed.model, compressed.baseline) == ("out", "base")
    assert compressed.metrics == {
        "piqa acc_norm (hf)": Metric(0.5, None, "accuracy"),
        "text bits_per_byte (hf)": Metric(1.5, None, "bits_per_byte"),
        "gen f1,none (hf)": Metric(0.25, None, "score"),
    }
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "tasks": [{}]}))
    with pytest.raises(ValueError, match=r"not an evaluation: tasks\.0\.task: field"):
        evaluation_measurements(path)


def test_speed_is_the_mean_ratio_over_rounds(tmp_path: Path) -> None:
    path = tmp_path / "nbl_benchmark.json"
    write_benchmark(path, "base", "out")
    base, compressed = benchmark_measurements(path)
    assert (base.model, base.baseline) == ("base", None)
    assert (compressed.model, compressed.baseline) == ("out", "base")
    prefill = compressed.metrics["prefill, 8 x 512 tokens, vllm"]
    # Rounds give 1.2 and 1.3; their standard deviation is 0.1 / sqrt(2).
    assert prefill.value == pytest.approx(1.25, rel=1e-12)
    assert prefill.standard_error == pytest.approx(0.05, rel=1e-12)
    decode = compressed.metrics["decode, 8 x 512 tokens, vllm"]
    assert decode == Metric(2.0, 0.0, "speed_ratio")
    assert base.metrics.keys() == compressed.metrics.keys()


def test_one_round_has_no_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "nbl_benchmark.json"
    write_benchmark(path, "base", "out")
    fields = json.loads(path.read_text())
    for row in fields["rows"]:
        row["base"], row["compressed"] = [100.0], [150.0]
    path.write_text(json.dumps(fields))
    metrics = benchmark_measurements(path)[1].metrics
    assert set(metrics.values()) == {Metric(1.5, None, "speed_ratio")}


def test_broken_benchmark_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nbl_benchmark.json"
    path.write_text('{"format_version": 1, "base": {}}')
    with pytest.raises(ValueError, match=re.escape(str(path))):
        benchmark_measurements(path)


def test_perplexity_of_a_report_is_that_of_its_last_step() -> None:
    evaluation = {
        "perplexity base": 10.0,
        "perplexity after NBLModifier": 11.0,
        "perplexity saved checkpoint": 12.0,
        "perplexity times base": 1.2,
        "perplexity times base, standard error": 0.02,
        "held-out tokens": 100.0,
    }
    report = make_report(evaluation=evaluation)
    base, compressed = report_measurements("out", report)
    assert (base.model, compressed.model) == (report.model, "out")
    assert compressed.baseline == report.model
    assert list(compressed.metrics.values()) == [Metric(1.2, 0.02, "perplexity_ratio")]


@pytest.mark.parametrize("evaluation", [None, {"perplexity base": 10.0}])
def test_report_without_a_pair_has_no_measurement(
    evaluation: dict[str, float] | None,
) -> None:
    assert report_measurements("out", make_report(evaluation=evaluation)) == []


def test_mean_accuracy_pools_errors() -> None:
    metrics = {"a": Metric(0.5, 0.03, "accuracy"), "b": Metric(0.7, 0.04, "accuracy")}
    mean = mean_accuracy(metrics)
    assert mean.value == pytest.approx(0.6, rel=1e-12)
    # sqrt(0.03^2 + 0.04^2) / 2
    assert mean.standard_error == pytest.approx(0.025, rel=1e-12)
    metrics["c"] = Metric(0.9, None, "accuracy")
    assert mean_accuracy(metrics).standard_error is None
