# SPDX-License-Identifier: Apache-2.0
"""Which windows each step of a training is taken on, in one process or in several."""

from __future__ import annotations

import math

import torch

from nbl_modifier.layer_statistics.processes import Ranks

__all__ = ["Schedule", "few_windows"]

# A trial of a learning rate takes so many windows, and so many steps at least.
_FEW_WINDOWS, _FEWEST_STEPS = 12, 6


def few_windows(per_step: int | None, ranks: Ranks) -> int:
    """
    Return on how many windows of each process a learning rate is tried, if it has them.

    :param per_step: as of :class:`Schedule`
    :param ranks: the processes
    :raises ValueError: as :class:`Schedule`
    """
    parts = _parts(per_step, ranks)
    return _few_steps(parts * ranks.size) * parts


def _few_steps(per_step: int) -> int:
    return max(math.ceil(_FEW_WINDOWS / per_step), _FEWEST_STEPS)


def _parts(per_step: int | None, ranks: Ranks) -> int:
    """Return how many windows of each process a step takes."""
    if per_step is None:
        return 1
    if per_step < 1 or per_step % ranks.size:
        raise ValueError(
            "distill, windows_per_step: must be a multiple of the number of processes, "
            f"{ranks.size}, got {per_step}. Use {ranks.size}, or leave it out."
        )
    return per_step // ranks.size


class Schedule:
    """
    The order of the windows, the same in every run.

    All windows are in as many parts as a step takes, each process has some of the
    parts, and a step takes the next window of each. So one process that takes two
    windows a step takes those that two processes take together, if each of these has
    half of them.

    :param num_windows: of this process
    :param per_step: windows that a step is taken on, in all processes together, a
        multiple of their number; None: one of each process
    :raises ValueError: for another number
    """

    def __init__(self, num_windows: int, per_step: int | None = None) -> None:
        ranks = Ranks()
        parts = _parts(per_step, ranks)
        self._parts = torch.arange(num_windows).tensor_split(parts)
        counts = ranks.gather(num_windows)
        #: Windows of all processes.
        self.num_windows = sum(counts)
        #: Steps of an epoch.
        self.num_steps = math.ceil(max(counts) / parts)
        self._few = _few_steps(parts * ranks.size)
        self._generator = torch.Generator()

    def steps(self, epoch: int) -> list[list[int]]:
        """
        Return the numbers of this process's windows of each step of an epoch.

        :param epoch: from 0
        :return: as many as :attr:`num_steps`; a step may have none
        """
        orders: list[list[int]] = []
        for part in self._parts:
            self._generator.manual_seed(epoch)
            order = torch.randperm(len(part), generator=self._generator)
            orders.append(part[order].tolist())
        return [
            [order[step] for order in orders if step < len(order)]
            for step in range(self.num_steps)
        ]

    def few(self) -> list[list[int]]:
        """Return the first steps, in which learning rates are tried."""
        return self.steps(0)[: self._few]
