# SPDX-License-Identifier: Apache-2.0
"""The bound and the canonical correlations against the paper's Algorithm 2."""

import dataclasses

import numpy as np
import pytest
import torch

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    canonical_correlations,
    damped_cholesky,
    nmse_bound,
)
from tests.numerics import oracle
from tests.numerics.cases import (
    conditioned_pair,
    gaussian_pair,
    one_massive_token,
    rounding,
    stats_of,
)
from tests.numerics.oracle import Array


def assert_matches_oracle(
    X: Array, Y: Array, shown_x: Array | None = None, shown_y: Array | None = None
) -> None:
    """
    Compare bound and correlations; the oracle may be shown X and Y in other units.

    A relative error ``rounding`` in a covariance moves the whitened cross-covariance,
    of norm at most 1, by that times the condition number; each correlation moves by at
    most as much, and each of the r terms 1 - rho^2 by twice as much. Twice again,
    since the oracle errs too, with the condition number of the unscaled covariance.
    """
    shown_x = X if shown_x is None else shown_x
    shown_y = Y if shown_y is None else shown_y
    stats = stats_of(X, Y)
    m = oracle.moments(shown_x, shown_y)
    condition = (
        np.linalg.cond(m.cov_xx)
        + np.linalg.cond(m.cov_yy)
        + oracle.condition_number(X)
        + oracle.condition_number(Y)
    )
    tolerance = 2.0 * rounding(len(X), max(X.shape[1], Y.shape[1])) * condition
    rho = canonical_correlations(stats)
    expected = oracle.canonical_correlations(shown_x, shown_y)
    assert rho.shape == (min(X.shape[1], Y.shape[1]),)
    assert bool((rho[:-1] >= rho[1:]).all())
    assert bool(((rho >= 0) & (rho <= 1)).all())
    assert np.max(np.abs(rho.numpy() - expected)) < tolerance
    bound = nmse_bound(stats)
    assert 0.0 <= bound <= Y.shape[1]
    assert abs(bound - oracle.nmse_bound(shown_x, shown_y)) < (
        2.0 * len(expected) * tolerance
    )


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_condition_numbers(condition: float) -> None:
    X, Y = conditioned_pair(condition)
    assert_matches_oracle(X, Y)
    assert_matches_oracle(Y, X)


@pytest.mark.parametrize(("d_in", "d_out"), [(40, 7), (7, 40), (1, 1), (24, 24)])
def test_rectangular(d_in: int, d_out: int) -> None:
    X, Y = gaussian_pair(512, d_in, d_out)
    assert_matches_oracle(X, Y)
    # Outputs beyond the rank of x cannot be predicted: each adds 1 to the bound.
    assert nmse_bound(stats_of(X, Y)) > d_out - min(d_in, d_out)


def test_large_means() -> None:
    X, Y = gaussian_pair(512, 24, 20)
    assert_matches_oracle(X + 1e3, Y - 1e3)


def test_one_massive_token() -> None:
    assert_matches_oracle(*one_massive_token())


def test_massive_channels() -> None:
    # CCA does not depend on units: the oracle, whose eigendecomposition does, is shown
    # the unscaled channels, so the tolerance is that of well-conditioned data.
    X, Y = gaussian_pair(512, 24, 20)
    big_x, big_y = X.copy(), Y.copy()
    big_x[:, [3, 11]] *= 1e6
    big_y[:, 5] *= 1e6
    assert_matches_oracle(big_x, big_y, shown_x=X, shown_y=Y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_activations(dtype: torch.dtype) -> None:
    X, Y = gaussian_pair(512, 24, 20)
    X = torch.from_numpy(X + 3.0).to(dtype).double().numpy()
    Y = torch.from_numpy(Y).to(dtype).double().numpy()
    assert_matches_oracle(X, Y)


def test_residual_target() -> None:
    # The paper's criterion: x against the residual stream after attention, y + x.
    X, Y = gaussian_pair(512, 24, 24)
    Y *= 0.3
    bound = nmse_bound(stats_of(X, Y).plus_input())
    tolerance = 8.0 * 24 * rounding(512, 24) * oracle.condition_number(X + Y)
    assert abs(bound - oracle.nmse_bound(X, X + Y)) < tolerance
    assert bound < 0.5 * nmse_bound(stats_of(X, Y))


def test_dead_channels_correlate_with_nothing() -> None:
    X, Y = gaussian_pair(512, 24, 20)
    live = stats_of(X[:, 2:], Y[:, 1:])
    X[:, :2], Y[:, 0] = 5.0, -1.0
    dead = stats_of(X, Y)
    # The dead output adds its 1; dead inputs change nothing, and add rho = 0.
    tolerance = 8.0 * 24 * rounding(512, 24) * oracle.condition_number(X)
    assert nmse_bound(dead) == pytest.approx(nmse_bound(live) + 1.0, abs=tolerance)
    rho, expected = canonical_correlations(dead), canonical_correlations(live)
    assert float((rho[:19] - expected).abs().max()) < tolerance
    assert float(rho[19]) < tolerance


def test_fewer_tokens_than_channels() -> None:
    # n tokens span n - 1 dimensions, and in them everything is linear: the true
    # correlations are 1 in 19 directions and undefined in the others. Dampening by
    # 1e-10 must keep the 19 within 1e-10 * 2 / (smallest nonzero eigenvalue, > 1e-2).
    X, Y = gaussian_pair(20, 24, 24)
    rho = canonical_correlations(stats_of(X, Y))
    assert bool((rho[:19] > 1.0 - 2e-8).all())
    bound = nmse_bound(stats_of(X, Y))
    assert 0.0 <= bound <= 24 - 19 + 19 * 4e-8


def test_given_factor_is_used() -> None:
    X, Y = gaussian_pair(200, 8, 6)
    stats = stats_of(X, Y)
    damped = damped_cholesky(stats.cov_xx, 1.0)
    mixed = nmse_bound(stats, factor_xx=damped)
    assert nmse_bound(stats, 1.0, factor_xx=damped) == nmse_bound(stats, 1.0)
    assert nmse_bound(stats) < mixed < nmse_bound(stats, 1.0)
    with pytest.raises(ValueError, match=r"6 x 6 matrix, got shape \(8, 6\)"):
        nmse_bound(stats, factor_xx=damped_cholesky(stats.cov_yx @ stats.cov_yx.mT))


def test_dampened_correlations() -> None:
    # C_xx + f mean(diag) I is the covariance of x and independent noise; the oracle's
    # algorithm on that matrix, for both sides.
    X, Y = gaussian_pair(512, 12, 9)
    m = oracle.moments(X, Y)
    damped_xx = m.cov_xx + 0.1 * np.trace(m.cov_xx) / 12 * np.eye(12)
    damped_yy = m.cov_yy + 0.1 * np.trace(m.cov_yy) / 9 * np.eye(9)
    whitened = (
        oracle.inverse_square_root(damped_yy)
        @ m.cov_yx
        @ oracle.inverse_square_root(damped_xx)
    )
    expected = np.linalg.svd(whitened, compute_uv=False)
    rho = canonical_correlations(stats_of(X, Y), 0.1).numpy()
    tolerance = 2.0 * rounding(512, 12) * np.linalg.cond(damped_xx)
    assert np.max(np.abs(rho - expected)) < tolerance


def test_cov_yy_is_needed() -> None:
    X, Y = gaussian_pair(50, 4, 3)
    slim = CovarianceAccumulator(4, 3, track_cov_yy=False)
    stats = slim.update(torch.from_numpy(X), torch.from_numpy(Y)).finalize()
    for function in (nmse_bound, canonical_correlations):
        with pytest.raises(ValueError, match="Accumulate with track_cov_yy=True"):
            function(stats)
        with pytest.raises(ValueError, match="got -1.0"):
            function(dataclasses.replace(stats_of(X, Y)), -1.0)
