# SPDX-License-Identifier: Apache-2.0
"""Linear maps of low rank: the best approximation of a map, for the inputs it sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .lmmse import LinearMap
from .stats import CovarianceStats, NonFiniteError


@dataclass(frozen=True)
class LowRankMap:
    """
    The affine map ``y = expand reduce x + bias`` that sends ``mean_x`` to ``mean_y``.

    :param expand: ``[d_out, rank]``, float64, orthonormal columns, so that rounding the
        features between the two factors changes y by as much and no more
    :param reduce: ``[rank, d_in]``, float64
    :param mean_x: ``[d_in]``, float64
    :param mean_y: ``[d_out]``, float64
    :param dampening_frac: as in :class:`LinearMap`
    """

    expand: Tensor
    reduce: Tensor
    mean_x: Tensor
    mean_y: Tensor
    dampening_frac: float

    @property
    def dense(self) -> LinearMap:
        """The same map as one matrix."""
        return LinearMap(
            self.expand @ self.reduce, self.mean_x, self.mean_y, self.dampening_frac
        )

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return both factors rounded to ``dtype`` and the bias that belongs to them.

        :param dtype: floating point, what the checkpoint stores
        :return: ``expand``, ``reduce`` and bias ``[d_out]``, all ``dtype``
        :raises NonFiniteError: if a value overflows ``dtype``
        """
        expand, reduce = self.expand.to(dtype), self.reduce.to(dtype)
        # Of the rounded factors, as in LinearMap.cast: a large mean_x times their
        # rounding errors would otherwise shift every output.
        mean = expand.double() @ (reduce.double() @ self.mean_x)
        bias = (self.mean_y - mean).to(dtype)
        for name, value in (("reduce", reduce), ("bias", bias)):
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"low-rank map: {name} must fit {dtype}, got NaN or an overflow. "
                    "Use bfloat16 or float32."
                )
        return expand, reduce, bias


def reduce_rank(stats: CovarianceStats, linear_map: LinearMap, rank: int) -> LowRankMap:
    """
    Return the map of rank ``rank`` whose outputs are closest to those of a map.

    With U the leading eigenvectors of ``W C_xx W^T``, the covariance of the map's
    outputs, it is ``U U^T W``: the minimum of ``E||W x - W_r x||^2`` over matrices of
    that rank. If W is the LMMSE estimator, undamped, the error of ``W x`` against y is
    uncorrelated with x, so the same matrix minimizes ``E||y - W_r x - b||^2``:
    reduced-rank regression (Izenman 1975, doi:10.1016/0047-259X(75)90042-1). Its error
    is the trace of C_yy less the ``rank`` largest eigenvalues.

    :param stats: moments of (x, y); of these, ``cov_xx``
    :param linear_map: weight ``[d_out, d_in]``, on the device of ``stats``
    :param rank: in ``[0, min(d_in, d_out)]``; 0 gives the mean of y
    :return: factors, float64, on the device of ``stats``
    :raises ValueError: if the rank or the shape does not fit
    """
    W = linear_map.weight
    if W.shape != stats.cov_yx.shape:
        raise ValueError(
            f"linear map: expected weight {tuple(stats.cov_yx.shape)}, "
            f"got {tuple(W.shape)}."
        )
    if not 0 <= rank <= min(W.shape):
        raise ValueError(f"rank: must be in [0, {min(W.shape)}], got {rank}.")
    outputs = torch.linalg.multi_dot((W, stats.cov_xx, W.mT))
    # eigh reads one triangle; the product is symmetric up to rounding only.
    _eigenvalues, vectors = torch.linalg.eigh(outputs.add(outputs.mT).div_(2.0))
    U = vectors[:, vectors.shape[1] - rank :].flip(1).contiguous()
    return LowRankMap(
        expand=U,
        reduce=U.mT @ W,
        mean_x=linear_map.mean_x,
        mean_y=linear_map.mean_y,
        dampening_frac=linear_map.dampening_frac,
    )
