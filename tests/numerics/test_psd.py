# SPDX-License-Identifier: Apache-2.0
"""When a matrix counts as positive definite, and what is added when it does not."""

import numpy as np
import pytest
import scipy.linalg
import torch

from nbl_modifier.numerics import DampedCholesky, damped_cholesky, psd
from tests.numerics import oracle
from tests.numerics.cases import conditioned_pair, gaussian_pair, rounding
from tests.numerics.oracle import Array


def covariance(X: Array) -> torch.Tensor:
    return torch.from_numpy(oracle.moments(X, X).cov_xx)


def reassembled(result: DampedCholesky) -> torch.Tensor:
    lower = result.scale[:, None] * result.factor.tril()
    return lower @ lower.mT


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of an entry relative to the two standard deviations."""
    std = expected.diagonal().sqrt()
    return float(((actual - expected).abs() / torch.outer(std, std)).max())


def test_factor_of_a_well_conditioned_matrix() -> None:
    cov = covariance(gaussian_pair(400, 30, 1)[0])
    result = damped_cholesky(cov)
    assert result.dampening_frac == 0.0
    assert result.num_dead == 0
    assert relative_error(reassembled(result), cov) < rounding(0, 30)


@pytest.mark.parametrize("width", [191, 192, 193, 400])
def test_panels_give_what_lapack_gives(width: int) -> None:
    cov = covariance(gaussian_pair(2 * width, width, 1)[0])
    scale = cov.diagonal().sqrt()
    whole, _ = psd._factor_whole(cov, scale, 1.5)
    panels, stopped_at = psd._factor_by_panels(cov, scale, 1.5)
    assert stopped_at == 0
    error = (panels.tril() - whole).abs().max()
    assert float(error) < rounding(0, width)


@pytest.mark.parametrize("at", [1, 191, 192, 300, 399])
def test_panels_stop_where_lapack_does(at: int) -> None:
    cov = torch.eye(400, dtype=torch.float64)
    cov[0, at] = cov[at, 0] = 2.0  # the pivot there is 1 - 2^2
    for factorize in (psd._factor_whole, psd._factor_by_panels):
        factor, stopped_at = factorize(cov, torch.ones(400, dtype=torch.float64), 1.0)
        assert stopped_at == at + 1
        assert float(factor[at, at]) == -3.0


@pytest.mark.parametrize("frac", [1e-6, 1e-2, 1.0])
def test_requested_dampening_is_that_of_gptq(frac: float) -> None:
    cov = covariance(gaussian_pair(400, 30, 1)[0] * np.logspace(0, 2, 30))
    expected = cov + frac * cov.diagonal().mean() * torch.eye(30, dtype=cov.dtype)
    result = damped_cholesky(cov, frac)
    assert result.dampening_frac == frac
    assert relative_error(reassembled(result), expected) < rounding(0, 30)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
def test_solves_against_scipy(condition: float) -> None:
    X, Y = conditioned_pair(condition)
    cov, rhs = covariance(X), torch.from_numpy(Y[:24, :5].copy())
    result = damped_cholesky(cov)
    assert result.dampening_frac == 0.0
    # Backward error ``rounding`` of a solve, times the condition number.
    tolerance = rounding(0, 24) * oracle.condition_number(X)
    lower = scipy.linalg.cholesky(cov.numpy(), lower=True)
    half = scipy.linalg.solve_triangular(lower, rhs.numpy(), lower=True)
    full = scipy.linalg.cho_solve((lower, True), rhs.numpy())
    for rows in (rhs, rhs.mT.contiguous().mT):  # row-major and column-major
        kept = rows.clone()
        for actual, wanted in (
            (result.half_solve(rows), half),
            (result.solve(rows), full),
        ):
            error = np.linalg.norm(actual.numpy() - wanted) / np.linalg.norm(wanted)
            assert error < tolerance
        assert torch.equal(rows, kept)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e6])
def test_massive_channels_need_no_dampening(scale: float) -> None:
    X = gaussian_pair(400, 24, 1)[0]
    plain = damped_cholesky(covariance(X))
    factors = torch.ones(24, dtype=torch.float64)
    factors[[3, 11]] = 2.0 ** round(np.log2(scale))
    cov = covariance(X)
    scaled = damped_cholesky(cov * torch.outer(factors, factors))
    assert scaled.dampening_frac == 0.0
    # Powers of two, so scaling is exact and must not change a single bit.
    assert torch.equal(scaled.factor.tril(), plain.factor.tril())
    assert torch.equal(scaled.scale, plain.scale * factors)


@pytest.mark.parametrize("width", [8, 64, 200])
@pytest.mark.parametrize("missing", [0, 1, 5])
@pytest.mark.parametrize("seed", range(5))
def test_fewer_tokens_than_channels_escalates(
    width: int, missing: int, seed: int
) -> None:
    # n tokens span n - 1 dimensions, so even n = d is singular. The last pivot is then
    # rounding noise amplified by the conditioning of the rest: it exceeds d * eps.
    cov = covariance(gaussian_pair(width - missing, width, 1, seed)[0])
    result = damped_cholesky(cov)
    assert result.dampening_frac == 1e-10
    assert bool(result.factor.tril().isfinite().all())
    expected = cov + 1e-10 * cov.diagonal().diag()
    assert relative_error(reassembled(result), expected) < rounding(0, width)


def test_one_token_more_than_channels_is_enough() -> None:
    cov = covariance(gaussian_pair(65 + 1, 65, 1)[0])
    assert damped_cholesky(cov).dampening_frac == 0.0


def test_escalation_ignores_the_massive_channel() -> None:
    # 1e-10 of the mean diagonal would be 4e4 times the variance of a normal channel.
    X = gaussian_pair(20, 24, 1)[0]
    X[:, 5] *= 1e8
    cov = covariance(X)
    result = damped_cholesky(cov)
    assert result.dampening_frac == 1e-10
    added = (reassembled(result) - cov).diagonal() / cov.diagonal()
    assert float((added - 1e-10).abs().max()) < rounding(0, 24)


def test_duplicated_channel_escalates() -> None:
    X = gaussian_pair(400, 24, 1)[0]
    X[:, 7] = -3.0 * X[:, 2]
    assert damped_cholesky(covariance(X)).dampening_frac == 1e-10


def test_requested_and_escalated_dampening_add_up() -> None:
    X = gaussian_pair(400, 24, 1)[0]
    X[:, 7] = X[:, 2] = 1e12 * X[:, 2]  # a ridge of 1e-16 of the mean is lost on these
    cov = covariance(X)
    result = damped_cholesky(cov, 1e-16)
    assert result.dampening_frac == pytest.approx(1e-10 + 1e-16, rel=1e-12, abs=0.0)
    added = (reassembled(result) - cov).diagonal().sum() / cov.diagonal().sum()
    assert float(added) == pytest.approx(
        result.dampening_frac, abs=float(rounding(0, 24))
    )


def test_escalation_goes_on_until_it_is_enough() -> None:
    # Smallest eigenvalue -1e-7 of the variances: 1e-7 is not enough, 1e-6 is.
    cov = torch.full((3, 3), 1.0 + 1e-7, dtype=torch.float64).fill_diagonal_(1.0)
    assert damped_cholesky(4.0 * cov).dampening_frac == 1e-6
    with pytest.raises(torch.linalg.LinAlgError, match="after adding 1e-07 of each"):
        damped_cholesky(cov, max_dampening_frac=1e-7)


def test_dead_channels_are_decoupled_without_dampening() -> None:
    X = gaussian_pair(400, 24, 1)[0]
    X[:, [0, 9, 23]] = 4.0
    live = np.setdiff1d(np.arange(24), [0, 9, 23])
    result = damped_cholesky(covariance(X))
    assert (result.dampening_frac, result.num_dead) == (0.0, 3)
    smaller = damped_cholesky(covariance(X[:, live]))
    rhs = torch.from_numpy(gaussian_pair(24, 2, 1)[0])
    error = (result.solve(rhs)[live] - smaller.solve(rhs[live])).norm()
    tolerance = rounding(0, 24) * oracle.condition_number(X)
    assert float(error / rhs.norm()) < tolerance
    ridge = damped_cholesky(covariance(X), 0.01)
    assert ridge.num_dead == 3
    assert bool((ridge.scale > 0).all())


def test_all_channels_dead() -> None:
    result = damped_cholesky(torch.zeros(4, 4, dtype=torch.float64))
    assert (result.dampening_frac, result.num_dead) == (0.0, 4)
    rhs = torch.ones(4, 1, dtype=torch.float64)
    assert torch.equal(result.solve(rhs), rhs)


def test_indefinite_matrix_is_an_error() -> None:
    cov = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    message = r"smallest pivot -3.0e\+00.*d=2.*1e-03 of each variance.*dampening_frac"
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        damped_cholesky(cov)
    with pytest.raises(torch.linalg.LinAlgError, match="a variance of -1.0"):
        damped_cholesky(-torch.eye(2, dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError, match="after adding 0e"):
        damped_cholesky(torch.ones(2, 2, dtype=torch.float64), max_dampening_frac=0.0)


def test_wrong_arguments() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        cov = eye.clone()
        cov[2, 1] = value
        with pytest.raises(ValueError, match="must be finite"):
            damped_cholesky(cov)
        with pytest.raises(ValueError, match=f"dampening_frac: .*got {value}"):
            damped_cholesky(eye, value)
    with pytest.raises(ValueError, match="got -0.5"):
        damped_cholesky(eye, -0.5)
    with pytest.raises(ValueError, match=r"square matrix, got \(2, 3\)"):
        damped_cholesky(eye[:2])
    with pytest.raises(ValueError, match=r"3 x 3 matrix, got shape \(2, 3\)"):
        damped_cholesky(eye).half_solve(eye[:2])
    with pytest.raises(ValueError, match=r"3 x 3 matrix, got shape \(3,\)"):
        damped_cholesky(eye).solve(eye[0])


@pytest.mark.parametrize("width", [16, 64])
def test_rounding_errors_of_float32_are_no_variance(width: int) -> None:
    """The output of a LayerNorm: its channels sum to 0, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, width, generator=generator)
    normed = torch.nn.functional.layer_norm(rows, (width,)).double()
    factor = damped_cholesky(torch.cov(normed.T))
    assert factor.dampening_frac == 1e-10
