# SPDX-License-Identifier: Apache-2.0
"""The phases of a run, and how often each runs the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbl_modifier.calibration.cost import Cost
from nbl_modifier.calibration.phases import Settings, plan

PAPER = Settings(num_layers=30, windows=96, held_out=0, candidates=range(30), count=8)
BEST = replace(PAPER, held_out=24, tried=True, greedy=True, epochs=4, rates=3, few=12)


def passes(settings: Settings) -> dict[str, float]:
    cost = Cost(settings.num_layers, settings.windows, 0, plan(settings))
    return {phase.name: cost.passes_of(phase) for phase in cost.phases}


def test_the_papers_method_takes_one_pass() -> None:
    assert passes(PAPER) == {"measuring": 1.0}
    assert passes(replace(PAPER, measures=False)) == {}


def test_trying_all_layers_takes_half_as_many_passes_as_there_are() -> None:
    """Over the held-out windows: layer i and those behind it, those before it once."""
    found = passes(replace(PAPER, tried=True, held_out=96))
    trials = 29 / 30 + 31 / 2
    assert found["selection"] == pytest.approx(trials + 1 + 1)  # base, and the choice


def test_phases_add_up_in_the_order_in_which_they_run() -> None:
    assert list(passes(replace(BEST, refit=True))) == [
        "measuring",
        "selection",
        "refit",
        "distillation",
    ]
    assert list(passes(replace(BEST, epochs=0))) == ["measuring", "selection"]


def test_preset_best_takes_at_most_25_passes() -> None:
    """Of 8 of 30 layers, backward passes counted as forward ones."""
    cost = Cost(30, 96, 0, plan(BEST))
    assert sum(map(cost.work, cost.phases)) / (30 * 96) < 25


def test_126_layers_of_which_any_may_be_chosen() -> None:
    settings = replace(BEST, num_layers=126, candidates=range(126), count=60)
    order = settings.spread()
    assert len(set(order)) == 60
    assert sum(passes(settings).values()) > 50


@pytest.mark.parametrize("count", [1, 7, 15])
def test_a_choice_before_there_is_one_is_of_candidates(count: int) -> None:
    settings = replace(
        PAPER, candidates=[*range(5), *range(20, 30)], count=min(15, count)
    )
    assert set(settings.spread()) <= set(settings.candidates)
    assert sorted(set(settings.spread())) == settings.spread()
