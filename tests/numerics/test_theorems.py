# SPDX-License-Identifier: Apache-2.0
"""What the theorems say, on arbitrary data: no oracle and no stored numbers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    LinearMap,
    canonical_correlations,
    mse,
    nmse,
    nmse_bound,
    solve_lmmse,
)
from tests.numerics.cases import gaussian_pair, rounding, stats_of
from tests.numerics.oracle import Array, condition_number

examples = settings(max_examples=100)
seeds = st.integers(0, 2**32 - 1)
widths = st.integers(1, 12)
fracs = st.sampled_from([0.0, 1e-6, 1e-2, 1.0])


@st.composite
def pairs(draw: st.DrawFn, square: bool = False) -> tuple[Array, Array]:
    """Correlated, shifted, unequally scaled X, and Y partly linear in it."""
    d_in, seed = draw(widths), draw(seeds)
    d_out = d_in if square else draw(widths)
    num_tokens = draw(st.integers(2 * (d_in + d_out) + 2, 80))
    noise = draw(st.sampled_from([1e-3, 0.5, 10.0]))
    X, Y = gaussian_pair(num_tokens, d_in, d_out, seed, noise)
    rng = np.random.default_rng(seed)
    X = (X + 0.5 * X @ rng.standard_normal((d_in, d_in))) * 10.0 ** rng.uniform(
        -2, 2, d_in
    )
    return X + rng.normal(scale=10.0, size=d_in), Y + rng.normal(size=d_out)


def tolerance_of(X: Array, Y: Array) -> float:
    """Rounding in the correlations times their condition numbers, see test_cca."""
    width = max(X.shape[1], Y.shape[1])
    offset = np.max(np.abs(X.mean(0)) / X.std(0)) + np.max(np.abs(Y.mean(0)) / Y.std(0))
    condition = condition_number(X) + condition_number(Y)
    return rounding(len(X), width) * condition * (1.0 + float(offset)) * width


def random_map(d_in: int, d_out: int, seed: int) -> LinearMap:
    rng = np.random.default_rng(seed)
    return LinearMap(
        torch.from_numpy(rng.standard_normal((d_out, d_in))),
        torch.from_numpy(rng.standard_normal(d_in)),
        torch.from_numpy(rng.standard_normal(d_out)),
        0.0,
    )


def assert_same_stats(
    left: CovarianceStats, right: CovarianceStats, tolerance: float
) -> None:
    assert left.num_tokens == right.num_tokens
    assert left.cov_yy is not None
    assert right.cov_yy is not None
    std_x, std_y = left.cov_xx.diagonal().sqrt(), left.var_y.sqrt()
    for a, b, scale in (
        (left.mean_x, right.mean_x, std_x),
        (left.mean_y, right.mean_y, std_y),
        (left.cov_xx, right.cov_xx, torch.outer(std_x, std_x)),
        (left.cov_yx, right.cov_yx, torch.outer(std_y, std_x)),
        (left.cov_yy, right.cov_yy, torch.outer(std_y, std_y)),
        (left.var_y, right.var_y, std_y**2),
    ):
        assert float(((a - b).abs() / scale).max()) < tolerance


@examples
@given(pairs(), fracs)
def test_bound_is_above_the_error(pair: tuple[Array, Array], frac: float) -> None:
    stats = stats_of(*pair)
    error = nmse(stats, solve_lmmse(stats, frac))
    assert 0.0 <= error <= 1.0 + tolerance_of(*pair)
    assert error <= nmse_bound(stats, frac) + tolerance_of(*pair)


def test_perfect_fits_stay_in_range() -> None:
    # Each of the three is 0 or 1 up to a rounding error of either sign: over 20 seeds
    # some would be out of range if they were not clamped. The other limits only say
    # that these are perfect fits; test_linear_data_is_solved derives theirs.
    for seed in range(20):
        X = gaussian_pair(50, 5, 1, seed)[0]
        stats = stats_of(X, X @ random_map(5, 5, seed).weight.numpy())
        assert 0.0 <= nmse(stats, solve_lmmse(stats)) < 1e-12
        assert 0.0 <= nmse_bound(stats) < 1e-6
        assert 1.0 - 1e-6 < float(canonical_correlations(stats).max()) <= 1.0


def test_bound_is_attained() -> None:
    # One output: the whitened error is the error, so the theorem holds with equality.
    X, Y = gaussian_pair(100, 7, 1)
    stats = stats_of(X, Y)
    error = nmse(stats, solve_lmmse(stats))
    assert 0.05 < error < 0.95
    assert nmse_bound(stats) == pytest.approx(error, abs=tolerance_of(X, Y))


@examples
@given(pairs(), seeds)
def test_correlations_are_affine_invariant(
    pair: tuple[Array, Array], seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def moved(Z: Array) -> Array:
        left, right = (
            np.linalg.qr(rng.standard_normal((Z.shape[1],) * 2))[0] for _ in range(2)
        )
        scales = 10.0 ** rng.uniform(-1, 1, Z.shape[1])
        return (Z @ (left * scales)) @ right + rng.standard_normal(Z.shape[1])

    X, Y = pair
    new_x, new_y = moved(X), moved(Y)
    # The map itself rounds: eps |Z| |A|, relative to the smallest direction left.
    tolerance = tolerance_of(X, Y) + 1e2 * tolerance_of(new_x, new_y)
    rho = canonical_correlations(stats_of(X, Y))
    bound = nmse_bound(stats_of(X, Y))
    for stats in (stats_of(new_x, Y), stats_of(X, new_y), stats_of(new_x, new_y)):
        assert float((canonical_correlations(stats) - rho).abs().max()) < tolerance
        assert abs(nmse_bound(stats) - bound) < 2.0 * len(rho) * tolerance


@examples
@given(pairs(), seeds)
def test_linear_data_is_solved(pair: tuple[Array, Array], seed: int) -> None:
    X = pair[0]
    d_in = X.shape[1]
    truth = random_map(d_in, d_in, seed)
    Y = (X - X.mean(0)) @ truth.weight.numpy().T + truth.mean_y.numpy()
    stats = stats_of(X, Y)
    solved = solve_lmmse(stats)
    tolerance = tolerance_of(X, Y)
    size = float((truth.weight.abs() @ stats.cov_xx.diagonal().sqrt()).square().sum())
    assert nmse(stats, solved) * float(stats.var_y.sum()) < tolerance * size
    # Y keeps full rank with probability 1, but its condition number is in tolerance.
    if solved.dampening_frac == 0.0 and tolerance < 1e-3:
        assert nmse_bound(stats) < 4.0 * d_in * tolerance
        assert float(canonical_correlations(stats).min()) > 1.0 - 2.0 * tolerance


@pytest.mark.parametrize("num_tokens", [200, 800, 3200])
def test_independent_data_is_not_correlated(num_tokens: int) -> None:
    # For independent Gaussians sum rho^2 has mean d_in d_out / (n - 1) and standard
    # deviation about sqrt(2 d_in d_out) / n: 5 of them.
    d_in, d_out = 10, 6
    X = gaussian_pair(num_tokens, d_in, 1, seed=1)[0]
    Y = gaussian_pair(num_tokens, d_out, 1, seed=2)[0]
    stats = stats_of(X, Y)
    expected = d_in * d_out / (num_tokens - 1)
    spread = 5.0 * np.sqrt(2.0 * d_in * d_out) / num_tokens
    rho = canonical_correlations(stats)
    assert abs(float(rho.square().sum()) - expected) < spread
    assert abs(d_out - nmse_bound(stats) - expected) < spread
    assert nmse(stats, solve_lmmse(stats)) > 1.0 - expected - spread


@examples
@given(pairs(), st.lists(st.integers(0, 80), max_size=6))
def test_any_batching_is_one_batch(pair: tuple[Array, Array], cuts: list[int]) -> None:
    X, Y = pair
    accumulator = CovarianceAccumulator(X.shape[1], Y.shape[1])
    edges = [0, *sorted(min(cut, len(X)) for cut in cuts), len(X)]
    for start, stop in itertools.pairwise(edges):
        accumulator.update(
            torch.from_numpy(X[start:stop]), torch.from_numpy(Y[start:stop])
        )
    assert_same_stats(accumulator.finalize(), stats_of(X, Y), tolerance_of(X, Y))


@examples
@given(pairs(), st.permutations(range(4)), st.booleans())
def test_merge_is_free_of_order(
    pair: tuple[Array, Array], order: list[int], balanced: bool
) -> None:
    X, Y = pair
    X = X + 100.0 * np.arange(len(X))[:, None] / len(X)  # parts of different means
    pieces = np.array_split(np.arange(len(X)), [1, len(X) // 3, len(X) // 2])
    parts = [
        CovarianceAccumulator(X.shape[1], Y.shape[1]).update(
            torch.from_numpy(X[rows]), torch.from_numpy(Y[rows])
        )
        for rows in (pieces[i] for i in order)
    ]
    if balanced:
        merged = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    else:
        merged = parts[3].merge(parts[2]).merge(parts[1]).merge(parts[0])
    assert_same_stats(merged.finalize(), stats_of(X, Y), tolerance_of(X, Y))


@examples
@given(pairs())
def test_gradient_is_zero_at_the_solution(pair: tuple[Array, Array]) -> None:
    X, Y = (torch.from_numpy(part) for part in pair)
    # Unit variances, so that one gradient norm is comparable to another.
    X, Y = (X - X.mean(0)) / X.std(0) + 0.5, Y / Y.std(0)
    solved = solve_lmmse(stats_of(X.numpy(), Y.numpy()))

    def gradient(weight: torch.Tensor, bias: torch.Tensor) -> float:
        weight, bias = (p.clone().requires_grad_() for p in (weight, bias))
        loss = (Y - X @ weight.mT - bias).square().sum() / len(X)
        loss.backward()
        assert weight.grad is not None
        assert bias.grad is not None
        return float(weight.grad.norm() + bias.grad.norm())

    tolerance = tolerance_of(X.numpy(), Y.numpy()) * (1.0 + float(solved.weight.norm()))
    assert gradient(solved.weight, solved.bias) < tolerance
    # The gradient does tell: at a map that is off by 0.1 it is of that size.
    assert gradient(solved.weight + 0.1, solved.bias) > 0.01


@examples
@given(pairs(), seeds, st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_no_map_is_better(pair: tuple[Array, Array], seed: int, step: float) -> None:
    X, Y = pair
    stats = stats_of(X, Y)
    best = solve_lmmse(stats)
    other = random_map(X.shape[1], Y.shape[1], seed)
    perturbed = LinearMap(
        best.weight + step * other.weight,
        best.mean_x + step * other.mean_x,
        best.mean_y + step * other.mean_y,
        0.0,
    )
    std_x = stats.cov_xx.diagonal().sqrt()
    size = float((perturbed.weight.abs() @ std_x).square().sum() + stats.var_y.sum())
    assert mse(stats, best) <= mse(stats, perturbed) + tolerance_of(X, Y) * size


@examples
@given(pairs(square=True))
def test_plus_input_is_the_statistics_of_the_sum(pair: tuple[Array, Array]) -> None:
    X, Y = pair
    derived = stats_of(X, Y).plus_input()
    # Rounding is relative to x and to y, which may cancel in part: condition_number.
    tolerance = tolerance_of(X, Y) + tolerance_of(X, X + Y)
    ratio = float(max(1.0, np.max((X.std(0) + Y.std(0)) / (X + Y).std(0)))) ** 2
    assert_same_stats(stats_of(X, X + Y), derived, ratio * tolerance)
    assert derived.cov_yy is not None
    assert torch.equal(derived.cov_yy, derived.cov_yy.mT)


@examples
@given(pairs(square=True), seeds)
def test_residual_target_has_the_same_error(
    pair: tuple[Array, Array], seed: int
) -> None:
    # y + x - (W + I) x = y - W x: adding the input changes only the normalization.
    X, Y = pair
    stats = stats_of(X, Y)
    residual = stats.plus_input()
    width = X.shape[1]
    eye = torch.eye(width, dtype=torch.float64)
    for linear_map in (solve_lmmse(stats), random_map(width, width, seed)):
        shifted = LinearMap(
            linear_map.weight + eye,
            linear_map.mean_x,
            linear_map.mean_y + linear_map.mean_x,
            0.0,
        )
        std_x = stats.cov_xx.diagonal().sqrt()
        size = float((shifted.weight.abs() @ std_x).square().sum())
        size += float(stats.var_y.sum() + residual.var_y.sum())
        size += float(linear_map.bias.square().sum() + width * np.sum(X.mean(0) ** 2))
        assert mse(residual, shifted) == pytest.approx(
            mse(stats, linear_map), abs=rounding(len(X), width) * size
        )
    solved = solve_lmmse(residual).weight - solve_lmmse(stats).weight
    std_x = stats.cov_xx.diagonal().sqrt()
    scale = float((std_x.sum() + residual.var_y.sqrt().sum()) + 1.0)
    error = float(((solved - eye) * std_x).abs().max())
    assert error < scale * tolerance_of(X, Y)
