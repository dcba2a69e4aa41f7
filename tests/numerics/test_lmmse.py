# SPDX-License-Identifier: Apache-2.0
"""The LMMSE map and the error of any map, against least squares on the activations."""

import dataclasses

import numpy as np
import pytest
import torch

from nbl_modifier.numerics import (
    LinearMap,
    NonFiniteError,
    damped_cholesky,
    expected_nmse,
    mse,
    nmse,
    solve_lmmse,
)
from tests.numerics import oracle
from tests.numerics.cases import (
    EPS,
    conditioned_pair,
    gaussian_pair,
    one_massive_token,
    rounding,
    stats_of,
)
from tests.numerics.oracle import Array


def assert_solves(
    X: Array, Y: Array, dampening_frac: float = 0.0, ridge: Array | None = None
) -> LinearMap:
    """
    Compare W with the oracle, columns in units of the channels' standard deviations.

    ``dW = (dC_yx - W dC_xx) C_xx^-1``: an error of ``rounding`` in the correlations is
    amplified by at most their condition number, relative to ``|std_y| + |W|``. The bias
    differs by ``dW mean_x`` and one rounding of each of its terms.
    """
    stats = stats_of(X, Y)
    actual = solve_lmmse(stats, dampening_frac)
    W, b = oracle.lmmse(X, Y, ridge)
    std_x, std_y = X.std(axis=0, ddof=1), Y.std(axis=0, ddof=1)
    if ridge is None:
        condition = oracle.condition_number(X)
    else:  # at most trace(R) / ridge
        damped = std_x > 0
        condition = float(
            X.shape[1] / np.min(ridge[damped] / (std_x**2 + ridge)[damped])
        )
    size = np.linalg.norm(std_y) + np.linalg.norm(W * std_x)
    tolerance = rounding(len(X), X.shape[1]) * condition * size
    error = np.linalg.norm((actual.weight.numpy() - W) * std_x)
    assert error < tolerance
    live = np.where(std_x > 0, std_x, 1.0)
    offset = float(np.linalg.norm(X.mean(axis=0) / live)) + 1.0
    assert np.linalg.norm(actual.bias.numpy() - b) < (tolerance + EPS * size) * offset
    return actual


def assert_same_error(X: Array, Y: Array, linear_map: LinearMap) -> None:
    """
    Compare mse and nmse with the residuals of the same map.

    The moments are off by ``rounding`` relative to the standard deviations, and enter
    multiplied by 1, W and W twice; the sums over d channels are part of ``rounding``.
    """
    stats = stats_of(X, Y)
    W, b = linear_map.weight.numpy(), linear_map.bias.numpy()
    std_x, std_y = X.std(axis=0, ddof=1), Y.std(axis=0, ddof=1)
    terms = (np.linalg.norm(std_y) + np.linalg.norm(np.abs(W) @ std_x)) ** 2
    expected = oracle.mse(X, Y, W, b)
    # The oracle rounds the bias of the map to double: error eps |b| in the residual.
    bias = (
        4.0 * EPS * (np.linalg.norm(b) + np.linalg.norm(np.abs(W) @ np.abs(X.mean(0))))
    )
    tolerance = rounding(len(X), X.shape[1]) * terms + bias * np.sqrt(terms + expected)
    assert abs(mse(stats, linear_map) - expected) < tolerance
    total = float(std_y @ std_y)
    actual = nmse(stats, linear_map)
    assert abs(actual - oracle.nmse(X, Y, W, b)) < 2.0 * tolerance / total


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_condition_numbers(condition: float) -> None:
    X, Y = conditioned_pair(condition)
    assert condition / 30 < oracle.condition_number(X) < condition * 30
    linear_map = assert_solves(X, Y)
    assert linear_map.dampening_frac == 0.0
    assert_same_error(X, Y, linear_map)


@pytest.mark.parametrize(("d_in", "d_out"), [(40, 7), (7, 40), (1, 1), (300, 20)])
def test_rectangular(d_in: int, d_out: int) -> None:
    X, Y = gaussian_pair(512, d_in, d_out)
    assert_same_error(X, Y, assert_solves(X, Y))


def test_large_means() -> None:
    X, Y = gaussian_pair(512, 24, 20)
    X, Y = X + 1e3, Y - 1e3
    assert_same_error(X, Y, assert_solves(X, Y))


def test_one_massive_token() -> None:
    X, Y = one_massive_token()
    linear_map = assert_solves(X, Y)
    assert linear_map.dampening_frac == 0.0
    assert_same_error(X, Y, linear_map)


def test_massive_channels() -> None:
    # The condition number of the correlations stays below 10, that of C_xx is 1e12:
    # the tolerance knows only the former.
    X, Y = gaussian_pair(512, 24, 20)
    X[:, [3, 11]] *= 1e6
    assert oracle.condition_number(X) < 10
    linear_map = assert_solves(X, Y)
    assert linear_map.dampening_frac == 0.0
    assert_same_error(X, Y, linear_map)


def test_fewer_tokens_than_channels() -> None:
    X, Y = gaussian_pair(20, 24, 8)
    ridge = 1e-10 * X.var(axis=0, ddof=1)
    linear_map = assert_solves(X, Y, ridge=ridge)
    assert linear_map.dampening_frac == 1e-10
    # 20 tokens in 24 dimensions are interpolated, but for a ridge of 1e-10.
    assert nmse(stats_of(X, Y), linear_map) < 1e-8


def test_dead_channels() -> None:
    X, Y = gaussian_pair(512, 24, 20)
    X[:, [0, 23]], Y[:, 4] = 7.0, -2.0
    linear_map = assert_solves(X, Y)
    assert linear_map.dampening_frac == 0.0
    assert not linear_map.weight[:, [0, 23]].any()
    assert not linear_map.weight[4].any()
    assert float(linear_map.bias[4]) == -2.0
    assert_same_error(X, Y, linear_map)


@pytest.mark.parametrize("frac", [1e-4, 1e-2])
def test_requested_dampening(frac: float) -> None:
    X, Y = gaussian_pair(512, 24, 20)
    X *= np.logspace(0.0, 2.0, 24)
    ridge = np.full(24, frac * X.var(axis=0, ddof=1).mean())
    linear_map = assert_solves(X, Y, frac, ridge)
    assert linear_map.dampening_frac == frac
    assert_same_error(X, Y, linear_map)  # the error without the ridge term


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_activations(dtype: torch.dtype) -> None:
    X, Y = gaussian_pair(512, 24, 20)
    X = torch.from_numpy(X + 3.0).to(dtype).double().numpy()
    Y = torch.from_numpy(Y).to(dtype).double().numpy()
    assert_same_error(X, Y, assert_solves(X, Y))


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 12), (17, 5), (5, 17)])
def test_error_of_any_map(d_in: int, d_out: int) -> None:
    X, Y = gaussian_pair(50, d_in, d_out)
    rng = np.random.default_rng(3)
    arbitrary = LinearMap(
        torch.from_numpy(rng.standard_normal((d_out, d_in))),
        torch.from_numpy(rng.standard_normal(d_in)),
        torch.from_numpy(rng.standard_normal(d_out)),
        0.0,
    )
    assert mse(stats_of(X, Y), arbitrary) > float(Y.var(axis=0).sum())
    assert_same_error(X + 3.0, Y - 2.0, arbitrary)


def test_error_without_cov_yy() -> None:
    X, Y = gaussian_pair(100, 6, 6)
    stats = stats_of(X, Y)
    linear_map = solve_lmmse(stats)
    slim = dataclasses.replace(stats, cov_yy=None)
    assert nmse(slim, linear_map) == nmse(stats, linear_map)


def test_given_factor_is_used() -> None:
    X, Y = gaussian_pair(100, 6, 4)
    stats = stats_of(X, Y)
    factor = damped_cholesky(stats.cov_xx, 0.1)
    given = solve_lmmse(stats, factor=factor)
    assert torch.equal(given.weight, solve_lmmse(stats, 0.1).weight)
    assert given.dampening_frac == 0.1
    wrong = damped_cholesky(torch.eye(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"5 x 5 matrix, got shape \(6, 4\)"):
        solve_lmmse(stats, factor=wrong)


def test_constant_target() -> None:
    X, Y = gaussian_pair(100, 6, 4)
    stats = stats_of(X, np.full_like(Y, 0.3))
    best = solve_lmmse(stats)
    assert nmse(stats, best) == 0.0
    moved = dataclasses.replace(best, mean_y=best.mean_y + 1.0)
    assert mse(stats, moved) == pytest.approx(4 * 100 / 99, rel=1e-14)
    assert nmse(stats, moved) == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_keeps_the_output_mean(dtype: torch.dtype) -> None:
    # Without the correction the mean moves by |W - round(W)| 1e3 sqrt(d), here more
    # than ten times what rounding the bias itself (half an ulp) can do.
    X, Y = gaussian_pair(512, 24, 20)
    X = X + 1e3 * np.sign(np.random.default_rng(5).standard_normal(24))
    linear_map = solve_lmmse(stats_of(X, Y))
    weight, bias = linear_map.cast(dtype)
    assert (weight.dtype, bias.dtype) == (dtype, dtype)
    assert torch.equal(weight, linear_map.weight.to(dtype))
    output = weight.double() @ linear_map.mean_x + bias.double()
    half_ulp = torch.finfo(dtype).eps / 2
    allowed = half_ulp * bias.double().abs() + 1e3 * 24 * EPS
    assert bool(((output - linear_map.mean_y).abs() <= allowed).all())
    naive = weight.double() @ linear_map.mean_x + linear_map.bias
    assert bool(((naive - linear_map.mean_y).abs() > allowed).any())


def test_cast_overflow_is_an_error() -> None:
    mean = torch.zeros(1, dtype=torch.float64)
    linear_map = LinearMap(torch.full((1, 1), 1e5).double(), mean, mean, 0.0)
    with pytest.raises(NonFiniteError, match=r"fit torch.float16, got .* 1e\+05"):
        linear_map.cast(torch.float16)
    assert linear_map.cast(torch.float32)[0].item() == 1e5


def test_wrong_maps() -> None:
    X, Y = gaussian_pair(100, 6, 4)
    stats = stats_of(X, Y)
    best = solve_lmmse(stats)
    with pytest.raises(ValueError, match=r"weight \(4, 6\), got \(6, 4\)"):
        nmse(stats, dataclasses.replace(best, weight=best.weight.mT))
    with pytest.raises(NonFiniteError, match="linear map: must be finite"):
        mse(stats, dataclasses.replace(best, weight=best.weight / 0.0))
    with pytest.raises(ValueError, match="got -1.0"):
        solve_lmmse(stats, -1.0)


@pytest.mark.parametrize(("num_tokens", "d_in"), [(60, 20), (300, 10), (40, 20)])
def test_expected_error_is_that_on_new_tokens(num_tokens: int, d_in: int) -> None:
    """Over many fits of noise, the mean error on new rows is what is expected."""
    rng = np.random.default_rng(0)
    slope = rng.standard_normal((3, d_in)) / d_in**0.5
    expected, actual = [], []
    for _ in range(400):
        X = rng.standard_normal((num_tokens, d_in))
        Y = X @ slope.T + rng.standard_normal((num_tokens, 3))
        stats = stats_of(X, Y)
        linear_map = solve_lmmse(stats)
        expected.append(expected_nmse(mse(stats, linear_map), num_tokens, d_in))
        # of new rows: the noise's variance and that of the map's error
        error = linear_map.weight.numpy() - slope
        bias = float(linear_map.bias.square().sum())
        actual.append(3 + np.sum(error**2) + bias)
    # In sample the error is too small by a factor of 1.07 (300 tokens) to 4.
    spread = np.hypot(np.std(expected), np.std(actual)) / 20  # of a mean of 400
    assert spread < 0.02 * np.mean(actual)
    assert abs(np.mean(expected) - np.mean(actual)) < 3 * spread


def test_nothing_can_be_expected_of_a_fit_without_spare_tokens() -> None:
    assert expected_nmse(0.1, 22, 20) == np.inf
    assert np.isfinite(expected_nmse(0.1, 23, 20))
