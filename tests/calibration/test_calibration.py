# SPDX-License-Identifier: Apache-2.0
"""One pass: layers are solved as they are finished, or read where they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.layer_statistics.origin import Origin
from nbl_modifier.layer_statistics.store import StatisticsStore
from tests.calibration.observed import Observed, observed, register

pytestmark = pytest.mark.usefixtures("one_thread")


def calibration(
    found: Observed, store: StatisticsStore | None = None, measure: bool = False
) -> Calibration:
    """Return a calibration that watches all layers, of which it keeps two."""
    solver = LayerSolver(layers=found.layers, measure_held_out=measure)
    made = Calibration(solver, Leaderboard("nmse", 2), held_out=(0, 3), store=store)
    for index in found.layers.modules:
        made.watch(index, register, found.in_flight)
    return made


def test_layers_are_solved_as_they_are_finished(llama: Path, rows: Dataset) -> None:
    found = observed(llama)
    made = calibration(found)
    found.run([[row] for row in rows["input_ids"]])
    for count, layer in enumerate(found.layers.modules.values(), 1):
        made.solve_finished(layer.modules())
        assert len(made.measured) == count
        assert len(made.replacements) == min(count, 2)
    made.finish()
    scores = made.scores()
    assert sorted(made.replacements) == sorted(
        sorted(scores, key=scores.__getitem__)[:2]
    )
    assert {each.num_tokens for each in made.measured.values()} == {16 * 64}


def test_stored_layers_are_read_and_not_watched(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    origin = Origin(
        model="tiny",
        model_digest="0",
        data_digest="0",
        num_samples=16,
        held_out=2,
        kind="attention",
        input="residual",
    )
    StatisticsStore.create(tmp_path, origin)
    results = []
    for _ in range(2):
        found = observed(llama)
        made = calibration(found, StatisticsStore.open(tmp_path), measure=True)
        attention = found.layers.attention(0)
        hooks = len(attention._forward_hooks)
        if hooks:  # the first time
            found.run([[row] for row in rows["input_ids"]])
        for layer in found.layers.modules.values():
            made.solve_finished(layer.modules())
        made.finish()
        results.append((hooks, made))
    (measured, first), (read, second) = results
    assert (measured, read) == (1, 0)
    assert first.scores() == second.scores()
    for index, replacement in first.replacements.items():
        weight = second.replacements[index].weight
        assert weight is not None
        assert replacement.weight is not None
        assert torch.equal(weight, replacement.weight)
    heldout = [[m.heldout_nmse for m in each.measured.values()] for _, each in results]
    assert heldout[0] == heldout[1]
    assert None not in heldout[0]


def test_a_layer_that_saw_nothing_is_left_out(llama: Path) -> None:
    found = observed(llama)
    made = calibration(found)
    made.solve_finished(found.layers.modules[0].modules())
    made.finish()
    assert made.measured == {}
