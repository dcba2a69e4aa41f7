"""solve_attention against the general functions it must agree with."""

import math

import pytest
import torch

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    nmse_bound,
    solve_attention,
    solve_lmmse,
)


def make_stats(num_tokens: int, dead: bool = False, width: int = 24) -> CovarianceStats:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -3, width, dtype=torch.float64) + 5.0
    if dead:
        x[:, 7] = 2.0
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    y = torch.tanh(x @ mixing)
    return CovarianceAccumulator(width, width).update(x, y).finalize()


@pytest.mark.parametrize(
    ("num_tokens", "dead", "dampening_frac"),
    [(500, False, 0.0), (500, False, 0.01), (500, True, 0.0), (20, False, 0.0)],
    ids=["exact", "damped", "dead channel", "fewer tokens than dimensions"],
)
def test_agrees_with_the_general_solvers(
    num_tokens: int, dead: bool, dampening_frac: float
) -> None:
    stats = make_stats(num_tokens, dead)
    solution = solve_attention(stats, dampening_frac)
    expected = solve_lmmse(stats, dampening_frac)
    torch.testing.assert_close(solution.linear_map.weight, expected.weight)
    residual = stats.plus_input()
    # Both take Cholesky's rounding error, eps times cond(C_xx) = 1e6, to the bound; the
    # escalated dampening of the rank-deficient case, 1e-10, makes cond at most 1e10.
    tolerance = 1e-5 if num_tokens <= 24 else 1e-8
    assert solution.bound == pytest.approx(
        nmse_bound(residual, dampening_frac), rel=tolerance, abs=tolerance
    )
    assert solution.residual_variance == pytest.approx(float(residual.var_y.sum()))
    assert solution.linear_map.dampening_frac == expected.dampening_frac


def test_what_is_above_the_factors_diagonal_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = make_stats(2000, width=400)  # some panels
    expected = solve_attention(stats)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **kwargs: torch.full(x.shape, math.nan).to(x)
    )
    actual = solve_attention(stats)
    assert actual.bound == expected.bound
    assert torch.equal(actual.linear_map.weight, expected.linear_map.weight)


def test_input_and_output_must_have_the_same_width() -> None:
    stats = CovarianceAccumulator(3, 2).update(torch.eye(3), torch.eye(3)[:, :2])
    with pytest.raises(ValueError, match="same width"):
        solve_attention(stats.finalize())
