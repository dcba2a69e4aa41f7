# SPDX-License-Identifier: Apache-2.0
"""
Damped Cholesky factorization of a covariance matrix, scaled to unit variances first.
The only place where positive definiteness is decided.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Dampening tried in turn when a matrix is not numerically positive definite: fewer
# tokens than channels, duplicated channels. Each is a fraction of every channel's own
# variance, that is, a multiple of I on the correlation matrix being factored: the least
# change in the units in which solvability is decided, whatever the channels' units. Not
# of mean(diag(cov)) as in GPTQ: a massive-activation channel sets that mean, so the
# ridge on all others would grow with it, up to erasing them. The first is 50 times the
# rounding error d * eps of a factorization at d = 8192, and nothing to the variances.
_ESCALATION = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

# Variance of the rounding errors of float32, as a fraction of a channel's, times 16.
# Behind a LayerNorm one direction has no other variance than this, and the map would
# have weights of 1e6 there.
_DATA_ROUNDING = 16 * torch.finfo(torch.float32).eps ** 2

# A channel of which the others explain all but this part of the variance is not counted
# as a direction of its own. Of text in a model of 576 channels, massive activations
# and all, none is as low; a token repeated behind another one leaves 6 of 128.
_DIRECTION = 1e-6

# An estimate this many times the tolerance is not improved any further: the smallest
# eigenvalue is below it, but by so much only if the first iteration had missed it.
_CLEAR = 1e3
_INVERSE_ITERATIONS = 3

# Columns at a time of a factor. In a factorization on a CPU, fewer make thin products,
# more spend too much on the squares on the diagonal. Not a power of two: rows of such a
# panel would compete for the same lines of the cache.
_PANEL = 192

_NOT_DEFINITE = (
    "covariance is not positive definite: smallest pivot {:.1e}, smallest eigenvalue "
    "about {:.1e} in units of the variances, needed {:.1e} (d={}), after adding {:.0e} "
    "of each variance. Use more calibration tokens than d, set a larger dampening_frac "
    "(such as 0.01), or allow a larger max_dampening_frac."
)


@dataclass(frozen=True)
class DampedCholesky:
    """
    Factor ``L = diag(scale) @ factor`` of a damped covariance ``A = L L^T``.

    ``scale`` holds the standard deviations, ``factor`` is the Cholesky factor of the
    correlation matrix, so it is indifferent to the units of each channel.

    :param scale: ``[d]``, float64, positive; 1 for a dead channel
    :param factor: ``[d, d]``, float64, in the lower triangle; above that is anything
    :param dampening_frac: what was added to the diagonal, in total, as a fraction of
        the trace of the covariance; dimensionless, 0 if nothing was
    :param num_dead: channels of zero variance
    """

    scale: Tensor
    factor: Tensor
    dampening_frac: float
    num_dead: int = 0

    def half_solve(self, rhs: Tensor) -> Tensor:
        """
        Return ``L^-1 rhs``.

        :param rhs: ``[d, k]``, float64; not modified
        :return: ``[d, k]``, float64, in the memory order of ``rhs``
        :raises ValueError: if ``rhs`` does not have d rows
        """
        self._check_rows(rhs)
        return self._half_solve_(rhs / self.scale[:, None])

    def half_solve_(self, rhs: Tensor) -> Tensor:
        """
        Return ``L^-1 rhs``, see :meth:`half_solve`, in the memory of ``rhs``.

        :param rhs: ``[d, k]``, float64; overwritten
        :return: ``rhs``
        :raises ValueError: if ``rhs`` does not have d rows
        """
        self._check_rows(rhs)
        return self._half_solve_(rhs.div_(self.scale[:, None]))

    def _half_solve_(self, scaled: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(
            self.factor, scaled, upper=False, out=scaled
        )

    def _check_rows(self, rhs: Tensor) -> None:
        width = self.scale.shape[0]
        if rhs.dim() != 2 or rhs.shape[0] != width:
            raise ValueError(
                f"right-hand side: the factor is of a {width} x {width} matrix, "
                f"got shape {tuple(rhs.shape)}."
            )

    def back_solve_(self, half: Tensor) -> Tensor:
        """
        Return ``L^-T half``, the second half of :meth:`solve`.

        :param half: ``[d, k]``, float64, from :meth:`half_solve`; overwritten
        :return: ``half``
        """
        torch.linalg.solve_triangular(self.factor.mT, half, upper=True, out=half)
        return half.div_(self.scale[:, None])

    def plus_transposed(self, matrix: Tensor, out: Tensor) -> Tensor:
        """
        Return ``L^T + matrix``.

        :param matrix: ``[d, d]``, float64; not modified
        :param out: ``[d, d]``, float64; overwritten
        :return: ``out``
        """
        for start in range(0, len(out), _PANEL):
            end = start + _PANEL
            out[:, start:end] = matrix[:, start:end]
            rows = self.factor[start:end, :end].tril(start)
            out[:end, start:end].addcmul_(rows.mT, self.scale[start:end])
        return out

    def solve(self, rhs: Tensor) -> Tensor:
        """
        Return ``A^-1 rhs = L^-T L^-1 rhs``.

        :param rhs: ``[d, k]``, float64; not modified
        :return: ``[d, k]``, float64, in the memory order of ``rhs``
        :raises ValueError: if ``rhs`` does not have d rows
        """
        return self.back_solve_(self.half_solve(rhs))

    @property
    def rank(self) -> int:
        """Directions in which the channels vary, of d; pivots tell, about."""
        pivots = self.factor.diagonal().square()
        return int((pivots > _DIRECTION).sum()) - self.num_dead

    @property
    def exact(self) -> bool:
        """Whether ``L L^T`` is the covariance itself: undamped, no dead channel."""
        return self.dampening_frac == 0.0 and self.num_dead == 0


def damped_cholesky(
    cov: Tensor, dampening_frac: float = 0.0, max_dampening_frac: float = 1e-3
) -> DampedCholesky:
    """
    Factor ``A = cov + ridge I + extra diag(cov + ridge I)``, ``extra`` mostly 0.

    ``ridge = dampening_frac * mean(diag(cov))``, as in GPTQ, is what was asked for.
    ``extra`` is the smallest of 0, 1e-10, 1e-9, ... that makes the matrix numerically
    positive definite. A channel of zero variance says nothing about the others: it
    becomes a row and column of the identity, and they need no dampening for it.

    :param cov: ``[d, d]``, float64, symmetric; one triangle is used
    :param dampening_frac: requested, fraction of ``mean(diag(cov))``, >= 0
    :param max_dampening_frac: largest ``extra`` to try; 0 forbids it
    :return: factor; its ``dampening_frac`` is ``trace(A - cov) / trace(cov)``
    :raises ValueError: if ``cov`` is not square and finite, or ``dampening_frac`` is
        negative or not finite
    :raises torch.linalg.LinAlgError: if a variance is negative, or the largest
        dampening was not enough
    """
    _check_arguments(cov, dampening_frac)
    diagonal = cov.diagonal()
    width = cov.shape[0]
    scale = (diagonal + dampening_frac * diagonal.mean()).sqrt()
    scale = scale.masked_fill(scale == 0, 1.0)
    # The size of the factorization's own rounding error, in a matrix of unit diagonal,
    # or that of the data: activations have at most the digits of float32.
    # Conditioning that the channels' scales alone cause has been divided out.
    tolerance = max(width * torch.finfo(cov.dtype).eps, _DATA_ROUNDING)
    extra = pivot = eigenvalue = 0.0
    for extra in (0.0, *(e for e in _ESCALATION if e <= max_dampening_frac)):
        factorize = _factor_whole if cov.is_cuda else _factor_by_panels
        factor, stopped_at = factorize(cov, scale, 1.0 + extra)
        pivot, eigenvalue = _definiteness(factor, stopped_at, tolerance)
        if eigenvalue > tolerance:
            used = dampening_frac + extra * (1.0 + dampening_frac)
            return DampedCholesky(scale, factor, used, int((diagonal == 0).sum()))
    raise torch.linalg.LinAlgError(
        _NOT_DEFINITE.format(pivot, eigenvalue, tolerance, width, extra)
    )


def _check_arguments(cov: Tensor, dampening_frac: float) -> None:
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"cov: expected a square matrix, got {tuple(cov.shape)}.")
    if not (0.0 <= dampening_frac < math.inf):
        raise ValueError(f"dampening_frac: must be finite, >= 0, got {dampening_frac}.")
    if not bool(cov.sum().isfinite()):
        raise ValueError("cov: must be finite, got NaN or inf.")
    smallest = float(cov.diagonal().min())
    if smallest < 0:
        raise torch.linalg.LinAlgError(
            f"covariance is not positive semidefinite: got a variance of {smallest}."
        )


def _factor_whole(cov: Tensor, scale: Tensor, diagonal: float) -> tuple[Tensor, int]:
    """
    Return the Cholesky factor of ``cov / (scale scale^T)`` with another diagonal.

    :param cov: ``[d, d]``, symmetric
    :param scale: ``[d]``, positive
    :param diagonal: value of all its elements
    :return: factor, in the lower triangle, and LAPACK's ``info``: 0, or the pivot,
        counted from 1, that was not positive and at which it stopped
    """
    # Transposed, a symmetric matrix is the same but column-major, as LAPACK has it: it
    # is factored in its own memory.
    factor = (cov / scale[:, None]).div_(scale).mT
    factor.diagonal().fill_(diagonal)
    info = torch.empty((), dtype=torch.int32, device=cov.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, int(info)


def _factor_by_panels(
    cov: Tensor, scale: Tensor, diagonal: float
) -> tuple[Tensor, int]:
    """
    Return what :func:`_factor_whole` does; faster on a CPU.

    There torch clears the other triangle of LAPACK's factor against the memory's grain.
    Here it is not even initialized, and the scaling happens in the cache. Left-looking,
    Golub and Van Loan, Matrix Computations, 4th ed., section 4.2.
    """
    width = cov.shape[0]
    factor = torch.empty_like(cov, memory_format=torch.contiguous_format)
    for start in range(0, width, _PANEL):
        end = min(start + _PANEL, width)
        panel = (cov[start:, start:end] / scale[start:, None]).div_(scale[start:end])
        panel.diagonal().fill_(diagonal)
        panel.addmm_(factor[start:, :start], factor[start:end, :start].mT, alpha=-1)
        square, below = panel[: end - start], panel[end - start :]
        corner, info = torch.linalg.cholesky_ex(square)
        factor[start:end, start:end] = corner
        if info:
            return factor, start + int(info)
        torch.linalg.solve_triangular(
            corner.mT, below, upper=True, left=False, out=below
        )
        factor[end:, start:end] = below
    return factor, 0


def _definiteness(factor: Tensor, info: int, tolerance: float) -> tuple[float, float]:
    """
    Return the smallest pivot and an estimate, from above, of the smallest eigenvalue.

    A pivot is an upper bound of that eigenvalue, but rounding leaves pivots far above
    ``d * eps`` in singular matrices. Hence inverse iteration, O(d^2), from ``L^-T e_k``
    with k the smallest pivot: for a singular matrix that is its null vector. For a unit
    vector v the estimate is ``1 / (v^T A^-1 v) = 1 / ||L^-1 v||^2``.
    """
    pivots = factor.diagonal()
    if info > 0:  # LAPACK stopped at this pivot, before its square root
        pivot = min(float(pivots[info - 1]), 0.0)
        return pivot, pivot  # no eigenvalue estimate, but it is at most the pivot
    vector = torch.zeros_like(pivots)[:, None]
    vector[pivots.argmin()] = 1.0
    half = vector
    for _ in range(_INVERSE_ITERATIONS):
        vector = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        vector = vector / torch.linalg.vector_norm(vector)
        half = torch.linalg.solve_triangular(factor, vector, upper=False)
        eigenvalue = 1.0 / float(half.square().sum())
        if eigenvalue > _CLEAR * tolerance:
            break
    return float(pivots.min()) ** 2, eigenvalue
