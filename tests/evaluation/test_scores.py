# SPDX-License-Identifier: Apache-2.0
"""Standard errors of scores against their definitions and against resampling."""

import json
import math
import random
import statistics

import pytest

from nbl_modifier.evaluation.scores import (
    Score,
    TaskScores,
    pooled,
    preferred_metric,
    ratio_score,
    stderr_of_sum,
)


def test_accuracy_has_the_textbook_error() -> None:
    hits = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    score = ratio_score(hits, [1.0] * 6, "acc", True)
    assert score.value == pytest.approx(4 / 6, rel=1e-12)
    expected = statistics.stdev(hits) / math.sqrt(6)
    assert score.stderr == pytest.approx(expected, rel=1e-12)
    assert sum(score.influence or ()) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("metric", "value"),
    [("bits_per_byte", 3 / math.log(2)), ("word_perplexity", math.exp(3))],
)
def test_metrics_of_a_log_likelihood(metric: str, value: float) -> None:
    assert ratio_score([-30.0, -60.0], [10, 20], metric, False).value == pytest.approx(
        value, rel=1e-12
    )


@pytest.mark.parametrize("metric", ["bits_per_byte", "byte_perplexity"])
def test_error_is_that_of_resampled_documents(metric: str) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(350, 700) for _ in range(400)]
    sums = [-length * rng.gauss(0.9, 0.15) for length in lengths]

    def value(places: list[int]) -> float:
        chosen = [sums[i] for i in places], [lengths[i] for i in places]
        return ratio_score(*chosen, metric, False).value

    resampled = [value(rng.choices(range(400), k=400)) for _ in range(500)]
    # 500 resamples give a standard deviation to 1 / sqrt(1000), 3%; four of those
    assert ratio_score(sums, lengths, metric, False).stderr == pytest.approx(
        statistics.stdev(resampled), rel=0.13
    )


def test_one_document_has_no_error() -> None:
    assert stderr_of_sum([0.0]) is None


def test_pooled_error_is_that_of_a_mean() -> None:
    assert pooled([0.03, 0.04]) == pytest.approx(0.025, rel=1e-12)
    assert pooled([0.02] * 4) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["acc", "acc_norm"], "acc_norm"),
        (["f1", "acc"], "acc"),
        (["exact_match,flexible-extract"], "exact_match,flexible-extract"),
        (["rouge1", "rouge2"], "rouge1"),
    ],
)
def test_preferred_metric(names: list[str], expected: str) -> None:
    assert preferred_metric(names) == expected


def test_scores_survive_json() -> None:
    scores = TaskScores(
        task="one",
        metric="acc",
        num_fewshot=5,
        num_documents=2,
        documents_hash="abc",
        scores={
            "acc": ratio_score([1.0, 0.0], [1, 1], "acc", True),
            "f1": Score(0.5, None, True),
        },
    )
    assert TaskScores.from_fields(json.loads(json.dumps(scores.to_fields()))) == scores
