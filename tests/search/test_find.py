# SPDX-License-Identifier: Apache-2.0
"""From a calibration to replacements: choose, refit, distill, each only if asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.search.budget import Budget
from nbl_modifier.search.find import SearchOptions, find_replacements
from tests.calibration.observed import Observed, observed
from tests.tiny_llama import DEMO_MODEL, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")

HELD_OUT = (2, 6, 10, 14)


def passes(found: Observed, rows: Dataset) -> Passes:
    def calibration(streams: Mapping[int, Tensor] | None) -> Calibration:
        solver, board = LayerSolver(layers=found.layers), Leaderboard("nmse", 4)
        return Calibration(solver, board, held_out=HELD_OUT, streams=streams)

    architecture = found.layers.architecture
    batches = [{"input_ids": torch.tensor([row])} for row in rows["input_ids"]]
    forward = PartialForward(found.model, architecture)
    return Passes(forward, architecture, Windows(batches), calibration)


def options(criterion: str = "nmse", **more: object) -> SearchOptions:
    budget = Budget(2, "two of them")
    return SearchOptions(criterion=criterion, budget=budget, **more)  # type: ignore[arg-type]


def test_the_criterion_asked_for_ranks() -> None:
    """Not the one by which replacements are held, as long as all are."""
    measured = passes(observed(DEMO_MODEL), token_rows(16, 64)).estimate(range(4))
    orders = set()
    for name in ("cca_bound", "nmse", "cosine"):
        figures = {i: getattr(each, name) for i, each in measured.measured.items()}
        order = sorted(figures, key=figures.__getitem__)
        assert find_replacements(measured, options(name)).order == order
        orders.add(tuple(order))
    assert len(orders) > 1


def test_statistics_alone_answer_without_running_the_model(
    llama: Path, rows: Dataset
) -> None:
    one = passes(observed(llama), rows)
    measured = one.estimate(range(4))
    outcome = find_replacements(measured, options())
    scores = measured.scores()
    assert outcome.order == sorted(scores, key=lambda index: scores[index])
    assert outcome.binding == "two of them"
    assert list(outcome.replacements) == outcome.order[:2]
    assert outcome.heldout is None
    again = find_replacements(measured, options(), one)  # no losses are asked for
    assert (again.order, again.heldout) == (outcome.order, None)


def test_each_step_is_taken_only_if_asked_for(llama: Path, rows: Dataset) -> None:
    found = observed(llama)
    one = passes(found, rows)
    measured = one.estimate(range(4))
    chosen = find_replacements(measured, options("kl"), one, HELD_OUT)
    assert chosen.heldout is not None
    assert (chosen.heldout.refitted, chosen.heldout.distilled) == (None, None)
    assert sorted(chosen.trials) == [0, 1, 2, 3]
    whole = options("kl", refit=True, epochs=1, rate=0.01)
    outcome = find_replacements(measured, whole, one, HELD_OUT)
    assert outcome.heldout is not None
    assert outcome.heldout.replaced == chosen.heldout.replaced
    assert outcome.heldout.refitted is not None
    assert outcome.heldout.distilled is not None
    assert outcome.order == chosen.order
    for index, replacement in outcome.replacements.items():
        before = chosen.replacements[index].weight
        assert before is not None
        assert replacement.weight is not None
        assert not torch.equal(replacement.weight, before)


def test_greedily_it_measures_what_is_left_again(llama: Path, rows: Dataset) -> None:
    one = passes(observed(llama), rows)
    measured = one.estimate(range(4))
    outcome = find_replacements(measured, options(greedy=True), one)
    first, second = outcome.order[:2]
    assert first == find_replacements(measured, options()).order[0]
    with one.replaced({first: outcome.replacements[first]}):
        expected = one.estimate({0, 1, 2, 3} - {first}).scores()
    assert outcome.scores[second] == expected[second] == min(expected.values())
