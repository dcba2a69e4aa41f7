# SPDX-License-Identifier: Apache-2.0
"""
The linear minimum mean squared error map from x to y, and the error of any affine
map, both from second moments alone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .psd import DampedCholesky, damped_cholesky
from .stats import CovarianceStats, NonFiniteError


@dataclass(frozen=True)
class LinearMap:
    """
    The affine map ``y = weight x + bias`` that sends ``mean_x`` to ``mean_y``.

    :param weight: ``[d_out, d_in]``, float64
    :param mean_x: ``[d_in]``, float64
    :param mean_y: ``[d_out]``, float64
    :param dampening_frac: dampening used to solve for ``weight``, dimensionless; see
        :class:`DampedCholesky`
    """

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    dampening_frac: float

    @property
    def bias(self) -> Tensor:
        """``mean_y - weight mean_x``, ``[d_out]``, float64."""
        return self.mean_y - self.weight @ self.mean_x

    def scaled(self, factor: float) -> "LinearMap":
        """
        Return the map to ``factor`` times y.

        :param factor: dimensionless
        """
        return replace(self, weight=self.weight * factor, mean_y=self.mean_y * factor)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """
        Return the weight rounded to ``dtype`` and the bias that belongs to it.

        :param dtype: floating point, what the checkpoint stores
        :return: weight ``[d_out, d_in]`` and bias ``[d_out]``, both ``dtype``
        :raises NonFiniteError: if a value overflows ``dtype``
        """
        weight = self.weight.to(dtype)
        # mean_y - weight mean_x again, but with the weight that will be used: its
        # rounding errors times a large mean_x (means are 1e3 times the spread in
        # some channels) would otherwise shift every output by a constant.
        bias = (self.mean_y - weight.double() @ self.mean_x).to(dtype)
        if not bool(weight.isfinite().all() & bias.isfinite().all()):
            largest = max(float(self.weight.abs().max()), float(self.bias.abs().max()))
            raise NonFiniteError(
                f"linear map: must fit {dtype}, got a value of magnitude "
                f"{largest:.3g}. Use bfloat16 or float32."
            )
        return weight, bias


def solve_lmmse(
    stats: CovarianceStats,
    dampening_frac: float = 0.0,
    *,
    factor: DampedCholesky | None = None,
) -> LinearMap:
    """
    Return the affine map minimizing ``E||y - Wx - b||^2`` under ``stats``.

    ``W = C_yx C_xx^-1``, ``b = E[y] - W E[x]``; NBL, arXiv:2505.21077, Algorithm 1.

    Note: with dampening ``C_xx`` is the damped matrix of :func:`damped_cholesky`, and
    a channel of x without variance gets weight 0. The paper's inverse has neither.

    :param stats: moments of (x, y)
    :param dampening_frac: fraction of ``mean(diag(cov_xx))``, >= 0; not used if
        ``factor`` is given
    :param factor: ``damped_cholesky(stats.cov_xx, ...)``, where the caller has it
    :return: weight ``[d_out, d_in]``, float64, on the device of ``stats``
    :raises ValueError: if ``dampening_frac`` is negative or ``factor`` does not fit
    :raises torch.linalg.LinAlgError: if ``cov_xx`` cannot be factored
    """
    if factor is None:
        factor = damped_cholesky(stats.cov_xx, dampening_frac)
    # W^T = C_xx^-1 C_xy; C_yx^T read as column-major is C_xy, without a copy.
    weight = factor.solve(stats.cov_yx.mT).mT
    return LinearMap(weight, stats.mean_x, stats.mean_y, factor.dampening_frac)


def mse(stats: CovarianceStats, linear_map: LinearMap) -> float:
    """
    Return ``sum_i ||y_i - W x_i - b||^2 / (num_tokens - 1)`` over the tokens of
    ``stats``, for any map, the best one or not.

    With ``e`` the mean error and ``n`` tokens this is
    ``trace(C_yy) + trace(W (W C_xx - 2 C_yx)^T) + n / (n - 1) ||e||^2``. The divisor
    is that of the covariances, so that :func:`nmse` is a ratio of two sums.

    :param stats: moments of (x, y)
    :param linear_map: weight ``[d_out, d_in]``, on the device of ``stats``
    :return: error in units of y squared, summed over the outputs, >= 0
    :raises ValueError: if the shapes differ
    :raises NonFiniteError: if the map contains NaN or inf
    """
    W = linear_map.weight
    if W.shape != stats.cov_yx.shape:
        raise ValueError(
            f"linear map: expected weight {tuple(stats.cov_yx.shape)}, "
            f"got {tuple(W.shape)}."
        )
    slope = torch.addmm(stats.cov_yx, W, stats.cov_xx, beta=-2.0)
    variance = stats.var_y.sum() + torch.sum(slope.mul_(W))
    # b = mean_y - W mean_x of the map, so the means enter only as differences.
    shift_x = stats.mean_x - linear_map.mean_x
    mean_error = stats.mean_y - linear_map.mean_y - W @ shift_x
    weight = stats.num_tokens / (stats.num_tokens - 1)
    error = float(variance + weight * mean_error.square().sum())
    if not math.isfinite(error):
        raise NonFiniteError(f"linear map: must be finite, got an error of {error}.")
    # A perfect fit is a difference of equal numbers, known to rounding error only:
    # it may come out as -1e-16 trace(C_yy), and an error is never negative.
    return max(0.0, error)


def nmse(stats: CovarianceStats, linear_map: LinearMap) -> float:
    """
    Return the mean squared error over ``trace(cov_yy)``, in sample.

    :param stats: moments of (x, y)
    :param linear_map: weight ``[d_out, d_in]``, on the device of ``stats``
    :return: dimensionless; 0 is exact, 1 is no better than the mean of y; 0 or inf if
        y is constant
    :raises ValueError: if the shapes differ
    :raises NonFiniteError: if the map contains NaN or inf
    """
    error, total = mse(stats, linear_map), float(stats.var_y.sum())
    if total == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / total


def expected_nmse(in_sample: float, num_tokens: int, d_in: int) -> float:
    """
    Return the NMSE to expect on new tokens of a map that was fitted on ``num_tokens``.

    A fit follows the noise of its own sample. For independent Gaussian rows this is
    undone by ``(n - 1) / (n - d - 1) * (n - 2) / (n - d - 2) * (n + 1) / n``: Stein
    1960, "Multiple regression"; Darlington 1968, Psychological Bulletin 69(3), as the
    cross-validated ``1 - R^2``.

    Note: neighbouring tokens are not independent, so the true error is somewhat larger
    still; held-out tokens measure it.

    :param in_sample: NMSE over the tokens of the fit
    :param num_tokens: n
    :param d_in: d
    :return: dimensionless; infinite if ``num_tokens <= d_in + 2``
    """
    n, d = num_tokens, d_in
    if n <= d + 2:
        return math.inf
    return in_sample * (n - 1) / (n - d - 1) * (n - 2) / (n - d - 2) * (n + 1) / n
