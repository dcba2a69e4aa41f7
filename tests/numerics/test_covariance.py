# SPDX-License-Identifier: Apache-2.0
"""Streamed moments against the batch oracle, and what update refuses."""

import copy

import numpy as np
import pytest
import torch

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    NonFiniteError,
)
from tests.numerics import oracle
from tests.numerics.cases import EPS, gaussian_pair, one_massive_token, rounding
from tests.numerics.oracle import Array


def stream(
    X: Array, Y: Array, batch: int, track_cov_yy: bool = True
) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(
        X.shape[1], Y.shape[1], track_cov_yy=track_cov_yy
    )
    for start in range(0, len(X), batch):
        rows = slice(start, start + batch)
        accumulator.update(torch.from_numpy(X[rows]), torch.from_numpy(Y[rows]))
    return accumulator


def assert_matches_oracle(stats: CovarianceStats, X: Array, Y: Array) -> None:
    """
    Entrywise, relative to the product of the two standard deviations.

    Besides the sums (``rounding``, with width 1: no norm of a matrix here), the mean of
    each batch is off by about eps |mean|. Against the batch's own centred values that
    cancels to first order; in the shift between batches, about std in size, it leaves
    n_batch std eps |mean| per batch, so in total eps |mean| / std of the variance.
    """
    expected = oracle.moments(X, Y)
    std_x = np.sqrt(np.diag(expected.cov_xx))
    std_y = np.sqrt(np.diag(expected.cov_yy))
    offset = max(
        np.max(np.abs(expected.mean_x) / std_x), np.max(np.abs(expected.mean_y) / std_y)
    )
    tolerance = rounding(len(X), 1) + 8.0 * EPS * offset
    assert stats.num_tokens == len(X)
    assert stats.cov_yy is not None
    for actual, wanted, scale in (
        (stats.mean_x, expected.mean_x, std_x + np.abs(expected.mean_x)),
        (stats.mean_y, expected.mean_y, std_y + np.abs(expected.mean_y)),
        (stats.cov_xx, expected.cov_xx, np.outer(std_x, std_x)),
        (stats.cov_yx, expected.cov_yx, np.outer(std_y, std_x)),
        (stats.cov_yy, expected.cov_yy, np.outer(std_y, std_y)),
        (stats.var_y, np.diag(expected.cov_yy), std_y**2),
    ):
        assert actual.dtype == torch.float64
        assert np.max(np.abs(actual.numpy() - wanted) / scale) < tolerance


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 24), (40, 7), (7, 40), (1, 1)])
@pytest.mark.parametrize("batch", [1, 37, 512, 10_000])
def test_streaming_equals_batch(d_in: int, d_out: int, batch: int) -> None:
    X, Y = gaussian_pair(512, d_in, d_out)
    assert_matches_oracle(stream(X, Y, batch).finalize(), X, Y)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_large_means_cost_no_accuracy(offset: float) -> None:
    # Raw second moments would be off by eps offset^2 = 2e-4 at 1e6; allowed is 2e-9.
    X, Y = gaussian_pair(1000, 24, 12)
    X, Y = X + offset, Y - offset
    assert_matches_oracle(stream(X, Y, 64).finalize(), X, Y)


def test_drifting_means() -> None:
    # Consecutive batches far apart: nearly all variance is between the batches.
    X, Y = gaussian_pair(600, 12, 12)
    drift = np.repeat(np.arange(6.0), 100)[:, None]
    X, Y = X + 100.0 * drift, Y - 50.0 * drift
    assert_matches_oracle(stream(X, Y, 100).finalize(), X, Y)


def test_one_massive_token() -> None:
    X, Y = one_massive_token()
    assert_matches_oracle(stream(X, Y, 512).finalize(), X, Y)


def test_channels_of_very_different_scale() -> None:
    X, Y = gaussian_pair(512, 24, 24)
    X[:, 3] *= 1e6
    Y[:, 5] *= 1e-6
    assert_matches_oracle(stream(X, Y, 100).finalize(), X, Y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_exact(dtype: torch.dtype) -> None:
    # The oracle sees the same rounded numbers, so the tolerance stays that of float64.
    X, Y = gaussian_pair(512, 24, 12)
    x, y = torch.from_numpy(X + 3.0).to(dtype), torch.from_numpy(Y).to(dtype)
    stats = CovarianceAccumulator(24, 12)
    for rows_x, rows_y in zip(x.split(100), y.split(100), strict=True):
        stats.update(rows_x, rows_y)
    assert_matches_oracle(stats.finalize(), x.double().numpy(), y.double().numpy())


def test_float16_sums_beyond_float16() -> None:
    # 1000 rows of 6e4 sum to 6e7 and their squares to 4e12; float16 ends at 65504.
    x = torch.full((1000, 2), 6e4, dtype=torch.float16)
    x[::2, 0] *= -1.0
    stats = CovarianceAccumulator(2, 2).update(x, x).finalize()
    value = float(x[1, 0])
    assert stats.mean_x.tolist() == [0.0, value]
    assert float(stats.cov_xx[0, 0]) == pytest.approx(
        value**2 * 1000 / 999, rel=rounding(1000, 1)
    )
    assert float(stats.cov_xx[1, 1]) == 0.0


def test_wide_statistics_are_symmetric_and_right() -> None:
    X, Y = gaussian_pair(400, 300, 260)
    stats = stream(X, Y, 128).finalize()
    assert stats.cov_yy is not None
    assert torch.equal(stats.cov_xx, stats.cov_xx.mT)
    assert torch.equal(stats.cov_yy, stats.cov_yy.mT)
    assert_matches_oracle(stats, X, Y)


def test_variance_without_cov_yy() -> None:
    X, Y = gaussian_pair(300, 8, 12)
    Y = Y + 1e3
    full = stream(X, Y, 50).finalize()
    slim = stream(X, Y, 50, track_cov_yy=False).finalize()
    assert slim.cov_yy is None
    np.testing.assert_allclose(slim.var_y, full.var_y, rtol=rounding(300, 1))
    assert torch.equal(slim.cov_yx, full.cov_yx)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constant_channel_has_no_variance(value: float, dtype: torch.dtype) -> None:
    X, Y = gaussian_pair(1000, 5, 4)
    X[:, 2], Y[:, 1] = value, value
    x, y = torch.from_numpy(X).to(dtype), torch.from_numpy(Y).to(dtype)
    accumulator = CovarianceAccumulator(5, 4)
    for rows_x, rows_y in zip(x.split(333), y.split(333), strict=True):
        accumulator.update(rows_x, rows_y)
    stats = accumulator.finalize()
    assert stats.cov_yy is not None
    for zero in (stats.cov_xx[2], stats.cov_xx[:, 2], stats.cov_yx[:, 2]):
        assert not zero.any()
    for zero in (stats.cov_yx[1], stats.cov_yy[1], stats.cov_yy[:, 1], stats.var_y[1]):
        assert not zero.any()
    assert bool((stats.cov_xx.diagonal() > 0).sum() == 4)


def test_small_variance_around_large_mean_survives() -> None:
    # One float32 step in one token of 4096 is a real signal, not rounding.
    x = torch.full((4096, 1), 100.0, dtype=torch.float32)
    x[7] = torch.nextafter(x[7], torch.tensor(200.0))
    step = float(x[7] - x[0])
    stats = CovarianceAccumulator(1, 1).update(x, x).finalize()
    # Two centred values of relative accuracy eps * 100 / step = 3e-9.
    assert float(stats.cov_xx) == pytest.approx(step**2 / 4096, rel=1e-8, abs=0.0)


def test_finalize_leaves_the_accumulator_usable() -> None:
    X, Y = gaussian_pair(200, 6, 6)
    accumulator = stream(X[:100], Y[:100], 50)
    first = accumulator.finalize()
    accumulator.update(torch.from_numpy(X[100:]), torch.from_numpy(Y[100:]))
    assert_matches_oracle(first, X[:100], Y[:100])
    assert_matches_oracle(accumulator.finalize(), X, Y)


def test_update_does_not_modify_its_input() -> None:
    X, Y = gaussian_pair(50, 4, 4)
    x, y = torch.from_numpy(X.copy()), torch.from_numpy(Y.copy()).requires_grad_()
    accumulator = CovarianceAccumulator(4, 4).update(x, y)
    assert np.array_equal(x.numpy(), X)
    assert np.array_equal(y.detach().numpy(), Y)
    assert not accumulator.finalize().cov_yx.requires_grad


def test_non_contiguous_rows() -> None:
    X, Y = gaussian_pair(120, 16, 16)
    x, y = torch.from_numpy(X)[::2, 1::2], torch.from_numpy(Y.T.copy()).mT[::2]
    stats = CovarianceAccumulator(8, 16).update(x, y).finalize()
    assert_matches_oracle(stats, X[::2, 1::2], Y[::2])


def test_empty_batches_and_merges_change_nothing() -> None:
    X, Y = gaussian_pair(100, 6, 3)
    accumulator = stream(X, Y, 100)
    accumulator.update(torch.empty(0, 6), torch.empty(0, 3))
    accumulator.merge(CovarianceAccumulator(6, 3))
    assert_matches_oracle(accumulator.finalize(), X, Y)
    assert_matches_oracle(
        CovarianceAccumulator(6, 3).merge(accumulator).finalize(), X, Y
    )


def test_merge_with_itself_is_every_row_twice() -> None:
    X, Y = gaussian_pair(100, 6, 3)
    accumulator = stream(X, Y, 100)
    stats = accumulator.merge(accumulator).finalize()
    assert_matches_oracle(stats, np.vstack([X, X]), np.vstack([Y, Y]))


def test_merge_does_not_modify_the_other() -> None:
    X, Y = gaussian_pair(200, 6, 3)
    left, right = stream(X[:90], Y[:90], 90), stream(X[90:], Y[90:], 40)
    assert left.merge(right).num_tokens == 200
    assert_matches_oracle(left.finalize(), X, Y)
    assert_matches_oracle(right.finalize(), X[90:], Y[90:])


def test_merge_without_cov_yy() -> None:
    X, Y = gaussian_pair(200, 6, 3)
    parts = [
        stream(X[rows], Y[rows], 50, False) for rows in (slice(90), slice(90, 200))
    ]
    stats = parts[0].merge(parts[1]).finalize()
    expected = np.diag(oracle.moments(X, Y).cov_yy)
    np.testing.assert_allclose(stats.var_y, expected, rtol=rounding(200, 1))


def test_nbytes() -> None:
    """Of a symmetric matrix one triangle."""
    assert CovarianceAccumulator(6, 3).nbytes == 8 * (21 + 18 + 6)
    assert CovarianceAccumulator(6, 3, track_cov_yy=False).nbytes == 8 * (21 + 18)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_non_finite_rows_are_refused(
    value: float, name: str, dtype: torch.dtype
) -> None:
    X, Y = gaussian_pair(100, 6, 3)
    accumulator = stream(X, Y, 50)
    bad = {"x": torch.zeros(20, 6, dtype=dtype), "y": torch.zeros(20, 3, dtype=dtype)}
    bad[name][[4, 17], 1] = value
    message = f"{name}: .*in 2 of 20 rows, first in row 4"
    with pytest.raises(NonFiniteError, match=message):
        accumulator.update(bad["x"], bad["y"])
    assert_matches_oracle(accumulator.finalize(), X, Y)  # unchanged


def test_overflow_of_float64_is_refused() -> None:
    huge = torch.full((4, 2), 1e308, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="x: the sum of 4 rows overflows"):
        CovarianceAccumulator(2, 2).update(huge, huge)
    wide = torch.tensor([[1e200], [-1e200]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="cov_xx: must be finite"):
        CovarianceAccumulator(1, 1).update(wide, wide).finalize()


def test_wrong_arguments_say_what_was_expected() -> None:
    accumulator = CovarianceAccumulator(6, 3)
    x, y = torch.zeros(5, 6), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \[num_tokens, 6\].*5, 4"):
        accumulator.update(torch.zeros(5, 4), y)
    with pytest.raises(ValueError, match=r"y: expected shape .*3\], got \(1, 5, 3\)"):
        accumulator.update(x, y[None])
    with pytest.raises(ValueError, match=r"x \(5, 6\) and y \(4, 3\)"):
        accumulator.update(x, y[:4])
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch.int64"):
        accumulator.update(x.long(), y)
    with pytest.raises(ValueError, match="must be positive, got 0, 3"):
        CovarianceAccumulator(0, 3)
    with pytest.raises(ValueError, match=r"got \(6, 3, False\) .* into \(6, 3, True\)"):
        accumulator.merge(CovarianceAccumulator(6, 3, track_cov_yy=False))
    assert accumulator.num_tokens == 0


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_too_few_tokens(num_tokens: int) -> None:
    accumulator = CovarianceAccumulator(2, 2)
    accumulator.update(torch.ones(num_tokens, 2), torch.ones(num_tokens, 2))
    with pytest.raises(ValueError, match=f"at least 2 tokens, got {num_tokens}"):
        accumulator.finalize()


def test_more_tokens_than_a_float32_or_an_int32_counts() -> None:
    """The same rows 2^30 times, which doubling takes 30 steps for."""
    X, Y = gaussian_pair(8, 3, 2, seed=0)
    accumulator = stream(X, Y, batch=8)
    once = accumulator.finalize()
    for _ in range(30):
        accumulator.merge(copy.deepcopy(accumulator))
    accumulator.update(torch.from_numpy(X[:1]), torch.from_numpy(Y[:1]))
    stats = accumulator.finalize()
    assert stats.num_tokens == 8 * 2**30 + 1
    # divisor n instead of n - 1, and one row more
    torch.testing.assert_close(stats.cov_xx, once.cov_xx * 7 / 8, rtol=1e-8, atol=0)
    alone = stream(X, Y, batch=8)
    alone._num_tokens = 2**33 + 1
    pooled = alone.pool_(lambda total: total.mul_(2), lambda total: total.mul_(2))
    assert pooled.num_tokens == 2**34 + 2
