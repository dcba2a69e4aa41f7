# SPDX-License-Identifier: Apache-2.0
"""
Statistics of parts of the data, put together: accumulators of several processes, for
which threads stand here.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from nbl_modifier.numerics import CovarianceAccumulator
from tests.numerics.cases import gaussian_pair
from tests.numerics.oracle import Array
from tests.numerics.test_covariance import assert_matches_oracle, stream


class Group:
    """What a process group does: sums over all members, in all of them or in one."""

    def __init__(self, size: int) -> None:
        self._slots: list[Tensor] = [torch.empty(0)] * size
        self._barrier = Barrier(size, timeout=30)

    def summing(self, rank: int, to: int | None = None) -> Callable[[Tensor], None]:
        def add_up(tensor: Tensor) -> None:
            self._slots[rank] = tensor.clone()
            self._barrier.wait()
            total = torch.stack(self._slots).sum(dim=0)
            self._barrier.wait()
            tensor.copy_(total if to in (None, rank) else torch.full_like(total, 7.0))

        return add_up


def pooled(
    X: Array, Y: Array, sizes: list[int], owner: int = 0, track_cov_yy: bool = True
) -> CovarianceAccumulator:
    """Return the owner's accumulator after each process saw its part of the rows."""
    group = Group(len(sizes))
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]

    def process(rank: int) -> CovarianceAccumulator:
        rows = slice(starts[rank], starts[rank] + sizes[rank])
        accumulator = stream(X[rows], Y[rows], 40, track_cov_yy)
        return accumulator.pool_(group.summing(rank), group.summing(rank, owner))

    with ThreadPoolExecutor(len(sizes)) as threads:
        return list(threads.map(process, range(len(sizes))))[owner]


@pytest.mark.parametrize("sizes", [[300], [150, 150], [10, 1, 289], [0, 300, 0]])
@pytest.mark.parametrize("owner", [0, -1])
def test_pooling_is_as_one_process(sizes: list[int], owner: int) -> None:
    X, Y = gaussian_pair(300, 24, 7)
    stats = pooled(X, Y, sizes, owner % len(sizes)).finalize()
    assert_matches_oracle(stats, X, Y)


def test_processes_whose_data_differ_in_the_mean() -> None:
    """The means differ by a thousand standard deviations from one to the next."""
    X, Y = gaussian_pair(300, 24, 7)
    X += 1e3 * (torch.arange(300).numpy() // 100)[:, None]
    Y -= 1e3 * (torch.arange(300).numpy() // 100)[:, None]
    assert_matches_oracle(pooled(X, Y, [100, 100, 100]).finalize(), X, Y)


def test_variance_of_y_alone() -> None:
    X, Y = gaussian_pair(300, 24, 7)
    whole = stream(X, Y, 300, track_cov_yy=False).finalize()
    parts = pooled(X, Y, [120, 180], track_cov_yy=False).finalize()
    assert parts.cov_yy is None
    torch.testing.assert_close(parts.var_y, whole.var_y)


def test_no_rows_at_all() -> None:
    X, Y = gaussian_pair(10, 4, 4)
    accumulator = pooled(X[:0], Y[:0], [0, 0])
    assert accumulator.num_tokens == 0
