# SPDX-License-Identifier: Apache-2.0
"""Maps of low rank, against a truncated SVD of the whitened regression."""

import numpy as np
import pytest
import torch

from nbl_modifier.numerics import (
    LinearMap,
    NonFiniteError,
    mse,
    nmse,
    reduce_rank,
    solve_lmmse,
)
from tests.numerics import oracle
from tests.numerics.cases import conditioned_pair, gaussian_pair, rounding, stats_of

D_IN, D_OUT, NUM_TOKENS = 24, 20, 4096


@pytest.mark.parametrize("rank", [1, 5, 19, 20])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_equals_the_oracle(rank: int, condition: float) -> None:
    X, Y = conditioned_pair(condition, NUM_TOKENS, D_IN, D_OUT)
    X, Y = X + 3.0, Y - 2.0
    stats = stats_of(X, Y)
    low = reduce_rank(stats, solve_lmmse(stats), rank)
    W, b = oracle.reduced_rank(X, Y, rank)
    assert low.expand.shape == (D_OUT, rank)
    assert low.reduce.shape == (rank, D_IN)
    # The eigenvectors are those of a matrix with gaps of 1e-3 of its norm and more (the
    # data is random), which divide the rounding error of the regression.
    tolerance = 1e3 * rounding(NUM_TOKENS, D_IN) * condition
    scale = np.linalg.norm(W * X.std(axis=0))
    error = (low.dense.weight.numpy() - W) * X.std(axis=0)
    assert np.linalg.norm(error) < tolerance * scale
    outputs = X @ low.dense.weight.numpy().T + low.dense.bias.numpy()
    assert np.abs(outputs - X @ W.T - b).max() < tolerance * np.abs(outputs).max()


def test_full_rank_is_lmmse_and_rank_zero_the_mean() -> None:
    X, Y = gaussian_pair(NUM_TOKENS, D_IN, D_IN)
    stats = stats_of(X, Y)
    full = solve_lmmse(stats)
    same = reduce_rank(stats, full, D_IN).dense
    # U U^T is the identity up to rounding
    torch.testing.assert_close(same.weight, full.weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(same.bias, full.bias, rtol=0, atol=1e-13)
    mean = reduce_rank(stats, full, 0).dense
    assert not mean.weight.any()
    assert torch.equal(mean.bias, stats.mean_y)
    assert nmse(stats, mean) == pytest.approx(1.0, abs=1e-14)


def test_error_falls_with_rank_by_the_eigenvalues() -> None:
    X, Y = gaussian_pair(NUM_TOKENS, D_IN, D_OUT)
    stats = stats_of(X, Y)
    full = solve_lmmse(stats)
    errors = [mse(stats, reduce_rank(stats, full, r).dense) for r in range(D_OUT + 1)]
    assert all(
        after < before for before, after in zip(errors, errors[1:], strict=False)
    )
    assert errors[-1] == pytest.approx(mse(stats, full), rel=1e-12)
    outputs = full.weight @ stats.cov_xx @ full.weight.T
    eigenvalues = np.linalg.eigvalsh(outputs.numpy())[::-1]
    falls = -np.diff(errors)
    np.testing.assert_allclose(falls, eigenvalues, rtol=0, atol=1e-12 * errors[0])


def test_no_other_map_of_that_rank_is_closer() -> None:
    """Local optimality: moving either factor any way does not help."""
    X, Y = gaussian_pair(NUM_TOKENS, D_IN, D_OUT)
    stats = stats_of(X, Y)
    best = reduce_rank(stats, solve_lmmse(stats), 4)
    error = mse(stats, best.dense)
    generator = torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-1):
        for _ in range(20):
            moved = LinearMap(
                (
                    best.expand
                    + step * torch.randn(D_OUT, 4, generator=generator).double()
                )
                @ (best.reduce + step * torch.randn(4, D_IN, generator=generator)),
                best.mean_x,
                best.mean_y,
                0.0,
            )
            assert mse(stats, moved) > error


def test_weights_the_inputs_it_sees() -> None:
    """A plain SVD of W keeps what W amplifies; here x has no energy there."""
    X, Y = conditioned_pair(1e6, NUM_TOKENS, D_IN, D_OUT)
    stats = stats_of(X, Y)
    full = solve_lmmse(stats)
    U, s, Vt = torch.linalg.svd(full.weight, full_matrices=False)
    plain = LinearMap((U[:, :4] * s[:4]) @ Vt[:4], stats.mean_x, stats.mean_y, 0.0)
    assert nmse(stats, reduce_rank(stats, full, 4).dense) < nmse(stats, plain) - 0.05


def test_columns_are_orthonormal_and_cast_keeps_the_mean() -> None:
    X, Y = gaussian_pair(NUM_TOKENS, D_IN, D_OUT)
    stats = stats_of(X + 1000.0, Y)
    low = reduce_rank(stats, solve_lmmse(stats), 6)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(low.expand.T @ low.expand, identity, rtol=0, atol=1e-14)
    expand, reduce, bias = low.cast(torch.bfloat16)
    assert {expand.dtype, reduce.dtype, bias.dtype} == {torch.bfloat16}
    at_mean = expand.double() @ (reduce.double() @ stats.mean_x) + bias.double()
    # one rounding of the bias, which is as large as what it cancels
    bound = 2.0**-8 * bias.double().abs().max()
    assert (at_mean - stats.mean_y).abs().max() < bound


def test_overflow_is_named() -> None:
    X, Y = gaussian_pair(NUM_TOKENS, D_IN, D_OUT)
    stats = stats_of(X * 1e-6, Y)
    low = reduce_rank(stats, solve_lmmse(stats), 2)
    with pytest.raises(NonFiniteError, match="reduce must fit torch.float16"):
        low.cast(torch.float16)


@pytest.mark.parametrize("rank", [-1, D_OUT + 1])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    stats = stats_of(*gaussian_pair(NUM_TOKENS, D_IN, D_OUT))
    with pytest.raises(ValueError, match=rf"\[0, {D_OUT}\], got {rank}"):
        reduce_rank(stats, solve_lmmse(stats), rank)


def test_other_shape_is_refused() -> None:
    stats = stats_of(*gaussian_pair(NUM_TOKENS, D_IN, D_OUT))
    other = stats_of(*gaussian_pair(NUM_TOKENS, D_IN, D_OUT - 1))
    with pytest.raises(ValueError, match=rf"expected weight \({D_OUT}, {D_IN}\)"):
        reduce_rank(stats, solve_lmmse(other), 2)
