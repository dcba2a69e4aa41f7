# SPDX-License-Identifier: Apache-2.0
"""
The two questions NBL asks of one attention layer, answered from one factorization: the
map from x to y, and the CCA bound from x to y + x.
"""

from dataclasses import dataclass

from .cca import nmse_bound_from_half_
from .lmmse import LinearMap
from .psd import damped_cholesky
from .stats import CovarianceStats


@dataclass(frozen=True)
class AttentionSolution:
    """
    What NBL needs to know of one layer.

    :param linear_map: LMMSE estimator of y from x
    :param bound: CCA bound on the NMSE of the best linear map from x to y + x,
        dimensionless, in ``[0, d]``
    :param residual_variance: trace of the covariance of y + x, in units of y squared
    :param rank: directions in which x varies, of d, see :attr:`DampedCholesky.rank`
    """

    linear_map: LinearMap
    bound: float
    residual_variance: float
    rank: int


def solve_attention(
    stats: CovarianceStats, dampening_frac: float = 0.0
) -> AttentionSolution:
    """
    Return the map from x to y and the bound from x to y + x.

    The same numbers as ``solve_lmmse(stats)`` and ``nmse_bound(stats.plus_input())``,
    with one triangular solve instead of two between them: with ``C_xx = L L^T``,
    ``L^-1 C_x,y+x = L^-1 C_xy + L^T``. NBL, arXiv:2505.21077, Algorithms 1 and 2.

    :param stats: moments of the residual stream x and the attention output y, with
        ``cov_yy``; ``d_in == d_out``
    :param dampening_frac: as in ``solve_lmmse`` and ``nmse_bound``, >= 0
    :raises ValueError: if ``d_in != d_out``, ``cov_yy`` was not tracked or
        ``dampening_frac`` is negative
    :raises torch.linalg.LinAlgError: if a covariance cannot be factored
    """
    residual = stats.cov_plus_input()
    variance = float(residual.diagonal().sum())
    factor_residual = damped_cholesky(residual, dampening_frac)
    factor = damped_cholesky(stats.cov_xx, dampening_frac)
    rank = factor.rank
    half = factor.half_solve(stats.cov_yx.mT)
    if factor.exact:  # L^-1 C_xx is L^T only then
        shared = factor.plus_transposed(half, out=residual)
    else:
        del residual  # as large as each of the factors
        shared = factor.half_solve((stats.cov_yx + stats.cov_xx).mT)
    bound = nmse_bound_from_half_(factor_residual, shared)
    weight = factor.back_solve_(half).mT
    linear_map = LinearMap(weight, stats.mean_x, stats.mean_y, factor.dampening_frac)
    return AttentionSolution(linear_map, bound, variance, rank)
