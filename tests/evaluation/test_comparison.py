# SPDX-License-Identifier: Apache-2.0
"""Recovery and its standard errors."""

import math
import random
import statistics
from collections.abc import Sequence

import pytest

from nbl_modifier.evaluation import Score, TaskScores, compare
from nbl_modifier.evaluation.comparison import Average, recovery
from nbl_modifier.evaluation.scores import ratio_score

N = 400


def accuracy(hits: Sequence[float]) -> Score:
    """Return the accuracy of documents that are right (1) or wrong (0)."""
    return ratio_score(hits, [1.0] * len(hits), "acc", True)


def bits(log_likelihoods: Sequence[float]) -> Score:
    """Return bits per byte of documents of 100 bytes."""
    return ratio_score(
        log_likelihoods, [100.0] * len(log_likelihoods), "bits_per_byte", False
    )


def task(name: str, score: Score, documents_hash: str = "same") -> TaskScores:
    """Return a task with one metric."""
    metric = "acc" if score.higher_is_better else "bits_per_byte"
    return TaskScores(name, metric, 0, N, documents_hash, {metric: score})


def hits(rate: float, seed: int) -> list[float]:
    """Return documents of which ``rate`` are right."""
    rng = random.Random(seed)
    return [float(rng.random() < rate) for _ in range(N)]


def test_recovery_of_accuracy_is_a_ratio() -> None:
    assert recovery(accuracy([1, 1, 1, 0]), accuracy([1, 1, 0, 0])).value == (
        pytest.approx(2 / 3, rel=1e-12)
    )


def test_recovery_turns_round_where_lower_is_better() -> None:
    base, worse = bits([-60.0, -60.0]), bits([-80.0, -80.0])
    assert recovery(base, worse).value == pytest.approx(0.75, rel=1e-12)


def test_same_answers_have_no_error_in_pairs() -> None:
    score = accuracy(hits(0.7, seed=0))
    kept = recovery(score, score)
    assert kept.value == 1.0
    assert kept.stderr == pytest.approx(0.0, abs=1e-15)
    assert kept.unpaired_stderr is not None
    assert kept.unpaired_stderr == pytest.approx(
        math.sqrt(2) * (score.stderr or 0.0) / score.value, rel=1e-12
    )


@pytest.mark.parametrize("kind", ["accuracy", "bits"])
def test_paired_error_is_that_of_resampled_documents(kind: str) -> None:
    rng = random.Random(1)
    if kind == "accuracy":
        base = hits(0.7, seed=2)
        other = [hit if rng.random() < 0.9 else 1 - hit for hit in base]
    else:
        base = [-rng.gauss(80, 20) for _ in range(N)]
        other = [value * rng.gauss(1.1, 0.1) for value in base]
    make = accuracy if kind == "accuracy" else bits

    def value(places: list[int]) -> float:
        pair = make([base[i] for i in places]), make([other[i] for i in places])
        return recovery(*pair).value

    resampled = [value(rng.choices(range(N), k=N)) for _ in range(500)]
    kept = recovery(make(base), make(other))
    # 500 resamples give a standard deviation to 1 / sqrt(1000), 3%; four of those
    assert kept.stderr == pytest.approx(statistics.stdev(resampled), rel=0.13)
    assert kept.unpaired_stderr is not None
    assert kept.stderr is not None
    assert kept.stderr < kept.unpaired_stderr


def test_unknown_documents_leave_the_unpaired_error() -> None:
    kept = recovery(Score(0.5, 0.03, True), Score(0.4, 0.02, True))
    assert kept.stderr is None
    # relative errors of 6% and 5%
    assert kept.unpaired_stderr == pytest.approx(0.8 * math.hypot(0.06, 0.05))


def test_base_of_zero_has_no_recovery() -> None:
    kept = recovery(accuracy([0, 0]), accuracy([1, 0]))
    assert math.isnan(kept.value)
    assert kept.stderr is None


def test_average_pools_over_tasks_and_leaves_perplexity_out() -> None:
    base = {
        "one": task("one", accuracy(hits(0.8, seed=3))),
        "two": task("two", accuracy(hits(0.6, seed=4))),
        "text": task("text", bits([-80.0, -90.0])),
    }
    average = compare(base, base).average
    assert average is not None
    assert average.num_tasks == 2
    scores = base["one"].score, base["two"].score
    assert average.base == pytest.approx(sum(s.value for s in scores) / 2, rel=1e-12)
    expected = math.sqrt(sum((s.stderr or 0.0) ** 2 for s in scores)) / 2
    assert average.base_stderr == pytest.approx(expected, rel=1e-12)
    assert average.recovery.value == 1.0
    assert average.recovery.stderr == pytest.approx(0.0, abs=1e-15)


def test_one_task_has_no_average() -> None:
    base = {"one": task("one", accuracy(hits(0.8, seed=3)))}
    assert compare(base, base).average is None


def test_other_documents_are_refused() -> None:
    score = accuracy(hits(0.8, seed=3))
    with pytest.raises(ValueError, match="one was not the same for both models"):
        compare({"one": task("one", score)}, {"one": task("one", score, "other")})


def test_other_tasks_are_refused() -> None:
    score = accuracy(hits(0.8, seed=3))
    with pytest.raises(ValueError, match=r"tasks differ, \['one'\] and \['two'\]"):
        compare({"one": task("one", score)}, {"two": task("two", score)})


@pytest.mark.parametrize("paired", [True, False])
def test_errors_of_the_average_are_those_of_resampled_documents(paired: bool) -> None:
    """Tasks of unequal size and rate; documents drawn anew within each task."""
    rng = random.Random(3)
    answers: list[tuple[list[float], list[float]]] = []
    for size, rate, kept in ((200, 0.8, 0.9), (400, 0.6, 0.85), (300, 0.3, 0.95)):
        base = [float(rng.random() < rate) for _ in range(size)]
        other = [hit if rng.random() < kept else 1 - hit for hit in base]
        answers.append((base, other))

    def average(draws: list[tuple[list[float], list[float]]]) -> Average:
        names = [f"task{i}" for i in range(len(draws))]
        sides = [
            {n: task(n, accuracy(d[i])) for n, d in zip(names, draws, strict=True)}
            for i in (0, 1)
        ]
        found = compare(*sides).average
        assert found is not None
        return found

    def drawn(base: list[float], other: list[float]) -> tuple[list[float], list[float]]:
        places = rng.choices(range(len(base)), k=len(base))
        others = places if paired else rng.choices(range(len(base)), k=len(base))
        return [base[i] for i in places], [other[i] for i in others]

    resampled = [average([drawn(*pair) for pair in answers]) for _ in range(500)]
    stated = average(answers)
    recoveries = statistics.stdev(each.recovery.value for each in resampled)
    errors = stated.recovery.stderr if paired else stated.recovery.unpaired_stderr
    # 500 resamples give a standard deviation to 1 / sqrt(1000), 3%; four of those
    assert errors == pytest.approx(recoveries, rel=0.13)
    for stderr, values in (
        (stated.base_stderr, [each.base for each in resampled]),
        (stated.compressed_stderr, [each.compressed for each in resampled]),
    ):
        assert stderr == pytest.approx(statistics.stdev(values), rel=0.13)
    assert stated.recovery.value == pytest.approx(stated.compressed / stated.base)
