"""solve_attention against the general functions it must agree with."""

import pytest
import torch

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    nmse_bound,
    solve_attention,
    solve_lmmse,
)


def make_stats(num_tokens: int, dead: bool = False) -> CovarianceStats:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, 24, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -3, 24, dtype=torch.float64) + 5.0
    if dead:
        x[:, 7] = 2.0
    y = torch.tanh(x @ torch.randn(24, 24, generator=generator, dtype=torch.float64))
    return CovarianceAccumulator(24, 24).update(x, y).finalize()


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


def test_input_and_output_must_have_the_same_width() -> None:
    stats = CovarianceAccumulator(3, 2).update(torch.eye(3), torch.eye(3)[:, :2])
    with pytest.raises(ValueError, match="same width"):
        solve_attention(stats.finalize())
