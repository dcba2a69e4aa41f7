# SPDX-License-Identifier: Apache-2.0
"""Passes of our own measure what the pipeline's pass does, and leave nothing behind."""

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
from tests.calibration.observed import Observed, observed, register

pytestmark = pytest.mark.usefixtures("one_thread")


def passes(found: Observed, rows: Dataset) -> Passes:
    def calibration(streams: Mapping[int, Tensor] | None) -> Calibration:
        solver = LayerSolver(layers=found.layers)
        return Calibration(solver, Leaderboard("nmse", 4), streams=streams)

    architecture = found.layers.architecture
    batches = [{"input_ids": torch.tensor([row])} for row in rows["input_ids"]]
    forward = PartialForward(found.model, architecture)
    return Passes(forward, architecture, Windows(batches), calibration)


def test_layer_by_layer_is_as_all_at_once(llama: Path, rows: Dataset) -> None:
    found = observed(llama)
    estimated = passes(found, rows).estimate([3, 1])
    assert not any(module._forward_hooks for module in found.model.modules())
    whole = Calibration(LayerSolver(layers=found.layers), Leaderboard("nmse", 4))
    for index in (1, 3):
        whole.watch(index, register, found.in_flight)
    found.run([[row] for row in rows["input_ids"]])
    whole.solve_finished(found.model.modules())
    assert estimated.scores() == whole.scores()
    for index, replacement in whole.replacements.items():
        weight = estimated.replacements[index].weight
        assert weight is not None
        assert replacement.weight is not None
        assert torch.equal(weight, replacement.weight)


def test_refit_of_one_layer_is_its_fit(llama: Path, rows: Dataset) -> None:
    """Nothing before it has changed what it reads."""
    one = passes(observed(llama), rows)
    fitted, again = one.estimate([2]), one.refit([2])
    weights = (each.replacements[2].weight for each in (fitted, again))
    # the target is a difference of float32 streams
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_replacements_are_in_the_model_for_so_long(llama: Path, rows: Dataset) -> None:
    found = observed(llama)
    one = passes(found, rows)
    attention = found.layers.attention(1)
    replacements = one.estimate([1]).replacements
    with one.replaced(replacements):
        assert found.layers.attention(1) is not attention
    assert found.layers.attention(1) is attention
