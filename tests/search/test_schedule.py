# SPDX-License-Identifier: Apache-2.0
"""The windows of each step: all of them once, in as many parts as a step takes."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.search.schedule import Schedule, few_windows


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_takes_every_window_once(
    count: int, per_step: int, epoch: int
) -> None:
    schedule = Schedule(count, per_step)
    steps = schedule.steps(epoch)
    assert sorted(chain.from_iterable(steps)) == list(range(count))
    assert len(steps) == schedule.num_steps == -(-count // per_step)
    assert max(map(len, steps)) <= per_step
    assert schedule.num_windows == count
    assert steps == Schedule(count, per_step).steps(epoch)
    few = few_windows(per_step, Ranks())
    assert len(list(chain.from_iterable(schedule.few()))) == min(few, count)
    assert schedule.few() == schedule.steps(0)[: len(schedule.few())]


def test_one_window_a_step_is_the_default() -> None:
    torch.manual_seed(3)
    (order,) = zip(*Schedule(20).steps(1), strict=True)
    assert sorted(order) == list(range(20)) != list(order)
    assert order != next(zip(*Schedule(20).steps(2), strict=True))


def test_a_step_of_two_takes_one_of_each_half() -> None:
    halves = [Schedule(10).steps(4), Schedule(9).steps(4)]
    first, second = ([number for (number,) in half] for half in halves)
    steps = Schedule(19, 2).steps(4)
    assert [step[0] for step in steps] == first
    assert [step[1] - 10 for step in steps[:-1]] == second


@pytest.mark.parametrize(
    ("per_step", "windows"), [(None, 12), (1, 12), (2, 12), (5, 30), (64, 6 * 64)]
)
def test_a_rate_is_tried_on_a_dozen_windows(per_step: int, windows: int) -> None:
    """More where these would be fewer than six steps."""
    assert few_windows(per_step, Ranks()) == windows


def test_a_step_on_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="of the number of processes, 1, got 0"):
        Schedule(8, 0)
