# SPDX-License-Identifier: Apache-2.0
"""Finished statistics: what they refuse, how two of them are put together."""

import dataclasses

import pytest
import torch

from nbl_modifier.numerics import (
    NonFiniteError,
)
from tests.numerics.cases import gaussian_pair
from tests.numerics.test_covariance import assert_matches_oracle, stream


def test_statistics_refuse_inconsistent_tensors() -> None:
    X, Y = gaussian_pair(50, 4, 3)
    stats = stream(X, Y, 50).finalize()
    with pytest.raises(
        ValueError, match=r"cov_yx: expected float64 \(3, 4\).*\(4, 3\)"
    ):
        dataclasses.replace(stats, cov_yx=stats.cov_yx.mT)
    with pytest.raises(ValueError, match="var_y: .*got torch.float32"):
        dataclasses.replace(stats, var_y=stats.var_y.float())
    with pytest.raises(NonFiniteError, match="cov_yx: must be finite"):
        dataclasses.replace(stats, cov_yx=stats.cov_yx / 0.0)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        dataclasses.replace(stats, num_tokens=1)


def test_plus_input_needs_square_and_cov_yy() -> None:
    X, Y = gaussian_pair(50, 4, 3)
    with pytest.raises(ValueError, match="d_in=4, d_out=3"):
        stream(X, Y, 50).finalize().plus_input()
    with pytest.raises(ValueError, match="cov_yy = None"):
        stream(X, X, 50, track_cov_yy=False).finalize().plus_input()


def test_to_keeps_every_value() -> None:
    X, Y = gaussian_pair(50, 4, 3)
    stats = stream(X, Y, 50, track_cov_yy=False).finalize()
    same = stats.to("cpu")
    assert (same.num_tokens, same.cov_yy) == (50, None)
    for name in ("mean_x", "mean_y", "cov_xx", "cov_yx", "var_y"):
        assert torch.equal(getattr(same, name), getattr(stats, name))


@pytest.mark.parametrize("first", [2, 150, 298])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_finished_statistics_merge(first: int, offset: float) -> None:
    X, Y = gaussian_pair(300, 24, 7)
    X[first:] += offset
    Y[first:] -= offset
    left, right = (
        stream(X[rows], Y[rows], 64).finalize()
        for rows in (slice(first), slice(first, None))
    )
    merged = left.merge(right)
    assert_matches_oracle(merged, X, Y)
    assert torch.equal(merged.cov_xx, merged.cov_xx.mT)
    assert left.num_tokens == first  # unchanged


def test_finished_statistics_merge_without_cov_yy() -> None:
    X, Y = gaussian_pair(300, 24, 7)
    whole = stream(X, Y, 300, track_cov_yy=False).finalize()
    left, right = (
        stream(X[rows], Y[rows], 64, track_cov_yy=False).finalize()
        for rows in (slice(100), slice(100, None))
    )
    merged = left.merge(right)
    assert merged.cov_yy is None
    torch.testing.assert_close(merged.var_y, whole.var_y)


def test_statistics_that_do_not_fit_are_not_merged() -> None:
    X, Y = gaussian_pair(30, 4, 4)
    full = stream(X, Y, 30).finalize()
    part = stream(X, Y, 30, track_cov_yy=False).finalize()
    narrow = stream(X[:, :3], Y, 30).finalize()
    for other in (part, narrow):
        with pytest.raises(ValueError, match="merge: expected the same widths"):
            full.merge(other)
