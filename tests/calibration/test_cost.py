# SPDX-License-Identifier: Apache-2.0
"""What a run is said to cost, and how long it is said to take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbl_modifier.calibration.cost import Cost, Progress, duration, statistics_bytes
from nbl_modifier.calibration.phases import Phase, Settings, plan

PAPER = Settings(num_layers=30, windows=96, held_out=0, candidates=range(30), count=8)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_told_after_the_first_layer() -> None:
    """Running the model and measuring a layer have a price of their own each."""
    phases = [
        Phase("measuring", layers=40, measured=4),
        Phase("refit", layers=60, heads=5, measured=2),
        Phase("distillation", layers=10, backward=10),
    ]
    cost, clock = Cost(4, 10, 640, phases, head=4.0), Clock()
    lines: list[str] = []
    progress = Progress(cost, lambda each: lines.append(each.line), clock)
    assert progress.seconds_left() is None
    progress.begin()
    clock.now += 2.0 * 10 + 7.0  # 10 windows through a layer, and its statistics
    progress.measured(7.0)
    progress.ran(10)
    work = 30 + (60 + 4 * 5) + (10 + 10)
    assert progress.seconds_left() == pytest.approx(2.0 * work + 7.0 * (3 + 2))
    assert lines[-1] == "NBL: measuring, 0.2 of 2.8 passes, about 5 min left"
    progress.start("refit")  # whatever was left of the phase before
    assert progress.seconds_left() == pytest.approx(2.0 * (work - 30) + 7.0 * 2)
    progress.ran(1000, heads=1000)  # more than was planned takes nothing off the rest
    assert progress.part == pytest.approx((40 + 80) / 140)
    progress.start("distillation")
    progress.ran(10, backward=10)
    assert progress.part == 1.0


def test_statistics_of_a_wide_model() -> None:
    """As README has it: 2 d^2 values to sum up, three moments, four to solve."""
    plain = statistics_bytes(8192, normalized=False, held_out=False, stored=False)
    assert plain == 8 * 7 * 8192**2
    best = statistics_bytes(8192, normalized=True, held_out=True, stored=False)
    assert best == 8 * 12 * 8192**2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5000, "83 min"), (7200, "2.0 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_said() -> None:
    text = str(
        Cost(
            4,
            10,
            640,
            plan(
                replace(PAPER, num_layers=4, windows=10, candidates=range(4), count=1)
            ),
            statistics_bytes=2_500_000_000,
        )
    )
    assert text == (
        "1.0 forward passes over 10 windows with 640 tokens (measuring 1.0); "
        "statistics of a layer take up to 2.5 GB"
    )


def test_what_is_read_from_statistics_costs_nothing() -> None:
    settings = replace(PAPER, windows=0, measures=False)
    progress = Progress(Cost(30, 0, 0, plan(settings)))
    progress.start("selection")
    progress.measured(0.5)
    progress.ran(0)
    assert (progress.passes, progress.part) == (0.0, 1.0)
    assert progress.line == "NBL: selection, 0.0 of 0.0 passes"
