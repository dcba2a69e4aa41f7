# SPDX-License-Identifier: Apache-2.0
"""
Canonical correlation analysis from second moments: the bound that ranks layers, and
the correlations themselves for those who want to look at them.
"""

import torch
from torch import Tensor

from .psd import DampedCholesky, damped_cholesky
from .stats import NO_COV_YY, CovarianceStats


def nmse_bound(
    stats: CovarianceStats,
    dampening_frac: float = 0.0,
    *,
    factor_xx: DampedCholesky | None = None,
) -> float:
    """
    Return the upper bound on the NMSE of the best linear map from x to y.

    ``NMSE <= (d_out - r) + sum_{i<=r} (1 - rho_i^2)``, with rho the canonical
    correlations; NBL, arXiv:2505.21077, Algorithm 2. The rho_i are the singular values
    of ``M = L_y^-1 C_yx L_x^-T`` for any ``C_xx = L_x L_x^T``, ``C_yy = L_y L_y^T``, so
    the bound is ``d_out - ||M||_F^2``: Cholesky factors do, where the paper takes two
    eigendecompositions and an SVD.

    Note: dampening either covariance raises the bound. It stays above the NMSE, that
    of the equally damped map included.

    :param stats: moments of (x, y), with ``cov_yy``
    :param dampening_frac: of ``cov_xx`` and of ``cov_yy``, a fraction of each one's
        mean diagonal, >= 0
    :param factor_xx: ``damped_cholesky(stats.cov_xx, ...)``, where the caller has it;
        ``dampening_frac`` is then used for ``cov_yy`` only
    :return: dimensionless, in ``[0, d_out]``; not divided by ``d_out``
    :raises ValueError: if ``stats.cov_yy`` is None, ``dampening_frac`` is negative or
        ``factor_xx`` does not fit
    :raises torch.linalg.LinAlgError: if a covariance cannot be factored
    """
    return _bound_of(_whitened_cross_covariance(stats, dampening_frac, factor_xx))


def nmse_bound_from_half_(factor_yy: DampedCholesky, half: Tensor) -> float:
    """
    Return :func:`nmse_bound` of a caller that has half of it.

    :param factor_yy: ``damped_cholesky(cov_yy, ...)``
    :param half: ``L_x^-1 C_xy``, ``[d_in, d_out]``, float64; overwritten
    :return: dimensionless, in ``[0, d_out]``
    """
    return _bound_of(factor_yy.half_solve_(half.mT))


def _bound_of(whitened: Tensor) -> float:
    # Where x determines y the two terms are equal up to rounding; no NMSE is below 0.
    return max(0.0, whitened.shape[0] - float(torch.linalg.vector_norm(whitened)) ** 2)


def canonical_correlations(
    stats: CovarianceStats, dampening_frac: float = 0.0
) -> Tensor:
    """
    Return the canonical correlations of x and y.

    Singular values of ``L_y^-1 C_yx L_x^-T``; NBL, arXiv:2505.21077, Algorithm 2. Many
    times the cost of :func:`nmse_bound`, which does not need them.

    :param stats: moments of (x, y), with ``cov_yy``
    :param dampening_frac: as in :func:`nmse_bound`
    :return: ``[min(d_in, d_out)]``, float64, descending, in [0, 1]
    :raises ValueError: if ``stats.cov_yy`` is None or ``dampening_frac`` is negative
    :raises torch.linalg.LinAlgError: if a covariance cannot be factored
    """
    M = _whitened_cross_covariance(stats, dampening_frac, None)
    # A correlation of 1 is computed as 1 + rounding error.
    return torch.linalg.svdvals(M).clamp_(max=1.0)


def correlation_quantiles(
    stats: CovarianceStats, dampening_frac: float = 0.0
) -> list[float]:
    """
    Return the canonical correlations in short: 21 quantiles, 5% apart.

    :param stats: moments of (x, y), with ``cov_yy``
    :param dampening_frac: as in :func:`nmse_bound`
    :return: from the least correlation to the greatest, interpolated linearly
    :raises ValueError: if ``stats.cov_yy`` is None or ``dampening_frac`` is negative
    :raises torch.linalg.LinAlgError: if a covariance cannot be factored
    """
    correlations = canonical_correlations(stats, dampening_frac)
    shares = torch.linspace(0, 1, 21, dtype=torch.float64, device=correlations.device)
    quantiles: list[float] = correlations.quantile(shares).tolist()
    return quantiles


def _whitened_cross_covariance(
    stats: CovarianceStats,
    dampening_frac: float,
    factor_xx: DampedCholesky | None,
) -> Tensor:
    if stats.cov_yy is None:
        raise ValueError(NO_COV_YY.format(what="CCA"))
    factor_yy = damped_cholesky(stats.cov_yy, dampening_frac)
    if factor_xx is None:
        factor_xx = damped_cholesky(stats.cov_xx, dampening_frac)
    return factor_yy.half_solve_(factor_xx.half_solve(stats.cov_yx.mT).mT)
