# SPDX-License-Identifier: Apache-2.0
"""Two processes find what one finds, and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from nbl_modifier.search.budget import Budget
from nbl_modifier.search.find import SearchOptions
from nbl_modifier.search.outcome import Outcome
from tests.search.two_processes import Found, Job, in_two_processes, search

pytestmark = pytest.mark.usefixtures("one_thread")

HELD_OUT = (2, 6, 10, 14)
# Of one process only.
_UNEVEN = (1, 2, 3)
_DISTILLED = {"epochs": 2, "per_step": 2}
# name: criterion, dtype, what else is asked for, relative difference of the maps
SEARCHES: dict[str, tuple[str, torch.dtype, dict[str, Any], float]] = {
    "statistics": ("nmse", torch.float64, {"greedy": True, "refit": True}, 1e-9),
    "trials": ("kl", torch.float64, {"greedy": True, "refit": True}, 1e-9),
    "uneven": (
        "kl",
        torch.float64,
        {"greedy": True, "refit": True, "held_out": _UNEVEN},
        1e-9,
    ),
    "loss": ("loss", torch.float64, {"greedy": True}, 1e-9),
    "distilled": (
        "kl_angle",
        torch.float32,
        {"greedy": True, "rate": 0.02, "copying": True, **_DISTILLED},
        1e-5,
    ),
    "rate found": ("kl", torch.float32, _DISTILLED, 1e-5),
}
FAILURES: dict[str, tuple[str, dict[str, Any]]] = {
    "in a trial": ("forward", {"greedy": True}),
    "in a pass": ("forward", {"greedy": True}),
    "in training": ("backward", {"epochs": 1}),
}
REFUSED: dict[str, dict[str, Any]] = {
    "an odd number a step": {"epochs": 1, "per_step": 3}
}


def job(
    folder: Path, rows: Dataset, criterion: str, dtype: torch.dtype, **more: Any
) -> Job:
    fails, held_out = more.pop("fails", None), more.pop("held_out", HELD_OUT)
    budget = Budget(3, "three of them")
    options = SearchOptions(criterion=criterion, budget=budget, **more)
    return Job(folder, dtype, rows["input_ids"], held_out, options, fails)


@pytest.fixture(scope="module")
def jobs(llama: Path, rows: Dataset) -> dict[str, Job]:
    found = {
        name: job(llama, rows, criterion, dtype, **more)
        for name, (criterion, dtype, more, _) in SEARCHES.items()
    }
    for name, (fails, more) in FAILURES.items():
        criterion = "nmse" if name == "in a pass" else "kl"
        found[name] = job(llama, rows, criterion, torch.float32, fails=fails, **more)
    for name, more in REFUSED.items():
        found[name] = job(llama, rows, "kl", torch.float32, **more)
    return found


@pytest.fixture(scope="module")
def both(
    jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Found]]:
    """What each of two processes found; all in one start, which takes seconds."""
    return in_two_processes(jobs, tmp_path_factory.mktemp("processes"))


def maps(outcome: Outcome) -> dict[str, Tensor]:
    """Return weights and biases by layer and name."""
    found: dict[str, Tensor] = {}
    for index, each in outcome.replacements.items():
        assert each.weight is not None
        assert each.bias is not None
        found |= {f"{index}.weight": each.weight, f"{index}.bias": each.bias}
    return found


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest one, relative to the largest value of a tensor."""
    assert mine.keys() == theirs.keys()
    return max(
        float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max())
        for name in theirs
    )


@pytest.mark.parametrize("name", SEARCHES)
def test_two_processes_find_what_one_finds(
    jobs: dict[str, Job], both: dict[str, list[Found]], name: str
) -> None:
    tolerance = SEARCHES[name][-1]
    alone = search(jobs[name])
    expected = alone.outcome
    assert expected is not None
    assert len(expected.replacements) == 3
    first, second = both[name]
    for found in (first, second):
        assert found.error == ""
        outcome = found.outcome
        assert outcome is not None
        assert outcome.order == expected.order
        assert outcome.scores == pytest.approx(expected.scores, rel=1e-7)
        assert difference(maps(outcome), maps(expected)) < tolerance
        assert difference(found.norms, alone.norms) < tolerance
        if expected.heldout is not None:
            assert outcome.heldout is not None
            assert outcome.heldout.num_windows == len(jobs[name].held_out)
            assert outcome.heldout.replaced == pytest.approx(
                expected.heldout.replaced, rel=1e-7
            )
    # of each process as of the other, to the last bit
    assert first.outcome is not None
    assert second.outcome is not None
    assert difference(maps(first.outcome), maps(second.outcome)) == 0
    assert difference(first.norms, second.norms) == 0
    assert first.outcome.heldout == second.outcome.heldout
    # and each runs the model half as often
    if jobs[name].held_out == HELD_OUT:
        assert first.windows == second.windows == alone.windows / 2 > 0
    assert first.windows + second.windows == alone.windows


def test_distillation_is_more_than_what_it_starts_from(
    jobs: dict[str, Job], both: dict[str, list[Found]]
) -> None:
    """Or the comparison above would say nothing of training."""
    for name in ("distilled", "rate found"):
        found = both[name][0].outcome
        assert found is not None
        assert found.heldout is not None
        assert found.heldout.distilled != found.heldout.replaced


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_in_one_process_ends_all(
    both: dict[str, list[Found]], name: str
) -> None:
    """At once: the processes wait for each other no longer than a minute."""
    first, second = both[name]
    assert second.error == "ArithmeticError: on purpose"
    assert first.error == (
        "RuntimeError: calibration failed in process 1 of 2: "
        "ArithmeticError: on purpose"
    )


def test_a_step_takes_as_many_windows_of_each(both: dict[str, list[Found]]) -> None:
    for found in both["an odd number a step"]:
        assert "a multiple of the number of processes, 2, got 3" in found.error
