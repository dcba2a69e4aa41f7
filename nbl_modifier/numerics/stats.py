# SPDX-License-Identifier: Apache-2.0
"""
Means and centred covariances of (x, y) pairs: the one input of the LMMSE solver and
of the CCA bound, and what is kept of the calibration activations.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

NO_COV_YY = (
    "{what}: needs the full covariance of y, got cov_yy = None. "
    "Accumulate with track_cov_yy=True."
)

# Rows transposed at once.
_STRIP = 256


class NonFiniteError(ValueError):
    """Raised when activations, or what is computed from them, are NaN or inf."""


@dataclass(frozen=True)
class CovarianceStats:
    """
    Means and centred covariances of ``num_tokens`` pairs (x, y), float64.

    Every covariance has divisor ``num_tokens - 1``.

    :param num_tokens: number of pairs, at least 2
    :param mean_x: ``[d_in]``
    :param mean_y: ``[d_out]``
    :param cov_xx: ``[d_in, d_in]``, bitwise symmetric
    :param cov_yx: ``[d_out, d_in]``, mean of ``(y - mean_y) (x - mean_x)^T``
    :param cov_yy: ``[d_out, d_out]``, bitwise symmetric, or None if not tracked
    :param var_y: ``[d_out]``, the diagonal of ``cov_yy``, always tracked
    :raises ValueError: if ``num_tokens < 2``, a tensor is not float64 or its shape
        contradicts ``mean_x`` and ``mean_y``
    :raises NonFiniteError: if a tensor contains NaN or inf
    """

    num_tokens: int
    mean_x: Tensor
    mean_y: Tensor
    cov_xx: Tensor
    cov_yx: Tensor
    cov_yy: Tensor | None
    var_y: Tensor

    def __post_init__(self) -> None:
        if self.num_tokens < 2:
            raise ValueError(
                "num_tokens: a covariance needs at least 2 tokens, "
                f"got {self.num_tokens}. Use more calibration data."
            )
        d_in, d_out = self.mean_x.numel(), self.mean_y.numel()
        expected = {
            "mean_x": (d_in,),
            "mean_y": (d_out,),
            "cov_xx": (d_in, d_in),
            "cov_yx": (d_out, d_in),
            "cov_yy": (d_out, d_out),
            "var_y": (d_out,),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is None and name == "cov_yy":
                continue
            if value.shape != shape or value.dtype != torch.float64:
                raise ValueError(
                    f"{name}: expected float64 {shape}, "
                    f"got {value.dtype} {tuple(value.shape)}."
                )
            # Finite exactly if every entry is (short of overflow), and unlike
            # isfinite(value) without a [d, d] temporary. Here, once, because a NaN
            # downstream would compare as the best layer or as none.
            if not bool(value.sum().isfinite()):
                raise NonFiniteError(
                    f"{name}: must be finite, got NaN, inf or an overflow of float64."
                )

    def plus_input(self) -> "CovarianceStats":
        """
        Return the statistics of the pair (x, y + x), from the moments alone.

        ``cov(y + x, x) = cov_yx + cov_xx`` and
        ``cov(y + x) = cov_yy + cov_yx + cov_yx^T + cov_xx``: the target of the CCA
        bound is the residual stream after attention, arXiv:2505.21077, Algorithm 2.

        :return: statistics of the same tokens, on the same device
        :raises ValueError: if ``d_in != d_out`` or ``cov_yy`` was not tracked
        """
        cov_yy = self.cov_plus_input()
        return CovarianceStats(
            num_tokens=self.num_tokens,
            mean_x=self.mean_x,
            mean_y=self.mean_y + self.mean_x,
            cov_xx=self.cov_xx,
            cov_yx=self.cov_yx + self.cov_xx,
            cov_yy=cov_yy,
            var_y=cov_yy.diagonal().clone(),
        )

    def cov_plus_input(self) -> Tensor:
        """
        Return the covariance of y + x alone, see :meth:`plus_input`.

        :return: ``[d, d]``, float64, bitwise symmetric, in memory of its own
        :raises ValueError: as :meth:`plus_input`
        """
        d_out, d_in = self.cov_yx.shape
        if d_in != d_out:
            raise ValueError(
                f"y + x: x and y need the same width, got d_in={d_in}, d_out={d_out}."
            )
        if self.cov_yy is None:
            raise ValueError(NO_COV_YY.format(what="y + x"))
        total = self.cov_yy + self.cov_xx
        # In strips, so that what is transposed stays in the cache. The sum of the two
        # comes first: that keeps bitwise symmetry.
        for start in range(0, d_in, _STRIP):
            strip = slice(start, start + _STRIP)
            total[:, strip] += self.cov_yx[:, strip] + self.cov_yx[strip].mT
        return total

    def merge(self, other: "CovarianceStats") -> "CovarianceStats":
        """
        Return the statistics of the tokens of both.

        By the identity of :class:`CovarianceAccumulator`, from covariances instead of
        sums: the same numbers, up to rounding, as if all had been seen together.

        :param other: of other tokens; same widths and device, ``cov_yy`` in both or in
            neither
        :raises ValueError: if the widths differ, or only one has ``cov_yy``
        """
        if self.cov_yx.shape != other.cov_yx.shape or (self.cov_yy is None) != (
            other.cov_yy is None
        ):
            raise ValueError(
                "merge: expected the same widths and cov_yy in both or in neither, got "
                f"{tuple(self.cov_yx.shape)} and {tuple(other.cov_yx.shape)}, cov_yy "
                f"{self.cov_yy is not None} and {other.cov_yy is not None}."
            )
        total = self.num_tokens + other.num_tokens
        part = other.num_tokens / total
        shift_x, shift_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        mine = (self.num_tokens - 1) / (total - 1)
        theirs = (other.num_tokens - 1) / (total - 1)
        # What the means add, as one row: a product of equal factors stays symmetric.
        weight = math.sqrt(part * self.num_tokens / (total - 1))
        row_x, row_y = weight * shift_x, weight * shift_y

        def add(name: str, left: Tensor, right: Tensor) -> Tensor:
            return (
                (getattr(self, name) * mine)
                .add_(getattr(other, name), alpha=theirs)
                .addr_(left, right)
            )

        cov_yy = None if self.cov_yy is None else add("cov_yy", row_y, row_y)
        var_y = mine * self.var_y + theirs * other.var_y
        return CovarianceStats(
            num_tokens=total,
            mean_x=self.mean_x + part * shift_x,
            mean_y=self.mean_y + part * shift_y,
            cov_xx=add("cov_xx", row_x, row_x),
            cov_yx=add("cov_yx", row_y, row_x),
            cov_yy=cov_yy,
            var_y=var_y + row_y.square()
            if cov_yy is None
            else cov_yy.diagonal().clone(),
        )

    def to(self, device: torch.device | str) -> "CovarianceStats":
        """
        Return the statistics with every tensor on ``device``.

        :param device: where to; must support float64
        :return: new statistics; tensors that are already there are shared
        """
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)
