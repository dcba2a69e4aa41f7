"""
What recipes keep of the base model's scores on real lm-eval tasks, row by row.

Thresholds come from ``derive_thresholds.py``, and the tests at the end show that a
broken estimator falls below them.
"""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.derive_thresholds import threshold
from integration_tests.lm_eval_rows import (
    LmEvalRow,
    compress,
    evaluate,
    lm_eval_rows,
    recoveries,
    shortfalls,
)
from nbl_modifier.evaluation.suites import tasks_of
from nbl_modifier.numerics import LinearMap

Record = Callable[[str, object], None]
Cast = Callable[[LinearMap, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
# One that derive_thresholds.py does not use.
SEED = 0

ROWS = [
    pytest.param(
        row,
        id=row.name,
        marks=[pytest.mark.requires_vllm] if row.lmeval.model == "vllm" else [],
    )
    for row in lm_eval_rows()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for checkpoints, logs and the base model's scores."""
    return tmp_path_factory.mktemp("lm_eval")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Callable[[LmEvalRow], Path]:
    """Return a function that makes a row's checkpoint, once per recipe."""
    made: dict[str, Path] = {}

    def make(row: LmEvalRow) -> Path:
        if row.recipe_text not in made:
            made[row.recipe_text] = folder / f"checkpoint-{len(made)}"
            compress(row, made[row.recipe_text], SEED)
        return made[row.recipe_text]

    return make


@pytest.mark.parametrize("row", ROWS)
def test_recovery(
    row: LmEvalRow,
    checkpoint: Callable[[LmEvalRow], Path],
    folder: Path,
    record_property: Record,
) -> None:
    results = evaluate(row, checkpoint(row), folder)
    for task, metrics in recoveries(row, results).items():
        for metric, value in metrics.items():
            record_property(f"{task} {metric}", f"{value:.4f}")
    assert not shortfalls(row, results)


@pytest.mark.parametrize("row", ROWS)
def test_every_task_of_a_row_has_a_threshold(row: LmEvalRow) -> None:
    expected = {task.name: [task.metric] for task in tasks_of(row.lmeval.tasks)}
    found = {name: list(least) for name, least in row.lmeval.recovery_threshold.items()}
    assert found == expected


def test_threshold_is_fallen_below_once_in_a_thousand() -> None:
    rng = random.Random(0)
    draws = 20_000
    below = sum(
        rng.gauss(0.9, 0.01) < threshold([rng.gauss(0.9, 0.01) for _ in range(6)])
        for _ in range(draws)
    )
    # 20 expected, less what rounding down to three digits takes; four and a half
    # standard deviations
    assert 0 < below < 40


def without_bias(cast: Cast) -> Cast:
    """Leave the bias out."""

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = cast(*args)
        return weight, torch.zeros_like(bias)

    return broken


def scaled_weight(cast: Cast) -> Cast:
    """Make the weight half as large."""

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = cast(*args)
        return weight / 2, bias

    return broken


def transposed_weight(cast: Cast) -> Cast:
    """Confuse rows and columns of the weight."""

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = cast(*args)
        return weight.T.contiguous(), bias

    return broken


@pytest.mark.parametrize("sabotage", [without_bias, scaled_weight, transposed_weight])
def test_broken_estimator_falls_below(
    sabotage: Callable[[Cast], Cast],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    (row,) = (row for row in lm_eval_rows() if row.name == "nbl_fixed_layers")
    lmeval = dataclasses.replace(row.lmeval, tasks=["nbl_stdlib_perplexity"])
    row = dataclasses.replace(row, lmeval=lmeval)
    monkeypatch.setattr(LinearMap, "cast", sabotage(LinearMap.cast))
    directory = folder / sabotage.__name__
    compress(row, directory, SEED)
    missed = shortfalls(row, evaluate(row, directory, folder))
    record_property("missed", "; ".join(missed))
    assert missed
