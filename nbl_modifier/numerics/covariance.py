# SPDX-License-Identifier: Apache-2.0
"""
Streaming second moments of (x, y) pairs: one batch at a time, float64, O(d^2) memory
whatever the number of tokens. Runs inside calibration, so it costs what its matrix
products cost.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from .gram import PackedSymmetric, add_cross_
from .stats import CovarianceStats, NonFiniteError

# A channel whose standard deviation is below this many units in the last place of
# its mean is constant: float64 cannot tell it from the rounding error of the mean.
_CONSTANT_ULPS = 32.0
# Where activations of 16 bits are multiplied in bfloat16: 15 times as fast as float64
# on an H100 by its data sheet, and more on GPUs that are not made for float64.
_TENSOR_CORES = frozenset({"cuda"})


class CovarianceAccumulator:
    """
    Accumulate the moments of (x, y) batch by batch, in float64.

    A batch of ``m`` rows with mean ``b`` joins ``n`` rows with mean ``a`` by
    ``S += sum_i (x_i - b)(x_i - b)^T + n m / (n + m) (b - a)(b - a)^T``
    (Chan, Golub and LeVeque, The American Statistician 37, 1983). Nothing is
    subtracted from a raw second moment, so a large mean costs no accuracy.

    A channel that never changes gets covariances of exactly 0, not rounding noise.

    On a GPU, activations of 16 bits are centred in float32, rounded to bfloat16 and
    multiplied by tensor cores, which add up at most 16,384 rows in float32. That rounds
    a centred value by 2^-9 of itself, where a bfloat16 activation is already rounded by
    2^-9 of the value with its mean.

    :param d_in: width of x
    :param d_out: width of y
    :param device: where the sums live and the products run; needs float64
    :param track_cov_yy: whether to accumulate ``[d_out, d_out]``, which the CCA bound
        and :meth:`CovarianceStats.plus_input` need
    :raises ValueError: if a width is not positive
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        device: torch.device | str = "cpu",
        track_cov_yy: bool = True,
    ) -> None:
        if d_in < 1 or d_out < 1:
            raise ValueError(f"d_in, d_out: must be positive, got {d_in}, {d_out}.")
        self._device = torch.device(device)
        self._num_tokens = 0
        self._mean_x = self._zeros(d_in)
        self._mean_y = self._zeros(d_out)
        # Sums of products of centred values.
        self._sum_xx = PackedSymmetric.zeros(d_in, self._device)
        self._sum_yx = self._zeros(d_out, d_in)
        self._sum_yy = (
            PackedSymmetric.zeros(d_out, self._device) if track_cov_yy else None
        )
        self._sum_y2 = self._zeros(d_out)  # the diagonal, where sum_yy is not kept

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    @property
    def num_tokens(self) -> int:
        """Number of rows accumulated so far."""
        return self._num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the float64 matrices, on ``device``; vectors are not counted."""
        return sum(total.nbytes for total in self._matrices())

    def update(self, x: Tensor, y: Tensor) -> Self:
        """
        Add a batch of rows. Temporaries: one copy of x and one of y, in float64 or
        what products are taken in.

        :param x: ``[num_tokens, d_in]``, any float dtype and device; not modified
        :param y: ``[num_tokens, d_out]``, any float dtype and device; not modified; row
            i belongs to row i of x
        :return: self
        :raises ValueError: on a wrong shape or a dtype that is not floating point
        :raises NonFiniteError: on NaN or inf; the accumulator is then unchanged
        """
        _check_batch("x", x, self._mean_x.shape[0])
        _check_batch("y", y, self._mean_y.shape[0])
        if x.shape[0] != y.shape[0]:
            raise ValueError(
                "x, y: expected as many rows in y as in x, "
                f"got x {tuple(x.shape)} and y {tuple(y.shape)}."
            )
        if x.shape[0] == 0:
            return self
        # Of y no more digits are wanted than its relation to x has.
        half = self._device.type in _TENSOR_CORES and x.element_size() == 2
        centred = self._centred_half if half else self._centred
        (rows_x, mean_x), (rows_y, mean_y) = centred(x), centred(y)
        # A NaN or inf reaches its column's mean, so d numbers tell. The rows are
        # searched only to word the error.
        if not bool(mean_x.isfinite().all() & mean_y.isfinite().all()):
            name, batch = ("y", y) if bool(mean_x.isfinite().all()) else ("x", x)
            raise NonFiniteError(_non_finite_message(name, batch))
        if half:
            self._add_products(rows_x, rows_y)
            rows_x, rows_y = self._zeros(1, x.shape[1]), self._zeros(1, y.shape[1])
        self._join(x.shape[0], mean_x, mean_y, rows_x, rows_y)
        return self

    def merge(self, other: "CovarianceAccumulator") -> Self:
        """
        Add everything ``other`` has seen; ``other`` is not modified.

        :param other: same widths and ``track_cov_yy``, any device
        :return: self
        :raises ValueError: if widths or ``track_cov_yy`` differ
        """
        mine, others = self._signature(), other._signature()
        if mine != others:
            raise ValueError(
                "merge: expected the same (d_in, d_out, track_cov_yy), "
                f"got {others} to merge into {mine}."
            )
        if other._num_tokens == 0:
            return self
        for total, theirs in zip(self._matrices(), other._matrices(), strict=True):
            total += theirs.to(self._device)
        self._sum_y2 += other._sum_y2.to(self._device)
        self._join(
            other._num_tokens,
            other._mean_x.to(self._device),
            other._mean_y.to(self._device),
            self._zeros(1, self._mean_x.shape[0]),
            self._zeros(1, self._mean_y.shape[0]),
        )
        return self

    def pool_(
        self, add_up: Callable[[Tensor], object], collect: Callable[[Tensor], object]
    ) -> Self:
        """
        Make this the accumulator of all processes' rows, in place.

        Each process calls it on its own, all in the same order. The sums of squares are
        moved to the common mean first, by the same identity as in :meth:`merge`, and
        can then be added.

        :param add_up: replaces a tensor, in every process, by its sum over all
        :param collect: the same, but only one process needs the sum; elsewhere the
            tensor is left undefined, and this accumulator with it
        :return: self
        """
        count = self._zeros(1) + self._num_tokens
        mean_x, mean_y = self._mean_x * count, self._mean_y * count
        for total in (count, mean_x, mean_y):
            add_up(total)
        if int(count) == 0:
            return self
        mean_x, mean_y = mean_x / count, mean_y / count
        weight = math.sqrt(self._num_tokens)
        shift_x = ((self._mean_x - mean_x) * weight)[None]
        shift_y = ((self._mean_y - mean_y) * weight)[None]
        self._sum_xx.add_gram_(shift_x)
        add_cross_(self._sum_yx, shift_y, shift_x)
        self._sum_y2 += shift_y[0].square()
        if self._sum_yy is not None:
            self._sum_yy.add_gram_(shift_y)
        for total in (*self._matrices(), self._sum_y2):
            collect(total)
        self._mean_x, self._mean_y = mean_x, mean_y
        self._num_tokens = int(count)
        return self

    def finalize(self) -> CovarianceStats:
        """
        Return the moments of all rows so far; the accumulator stays usable.

        :return: float64 statistics on ``device``, sharing no memory with the state
        :raises ValueError: if fewer than 2 tokens were seen
        :raises NonFiniteError: if a sum of squares overflowed float64
        """
        if self._num_tokens < 2:
            raise ValueError(
                "num_tokens: a covariance needs at least 2 tokens, "
                f"got {self._num_tokens}. Use more calibration data."
            )
        scale = 1.0 / (self._num_tokens - 1)
        cov_xx = self._sum_xx.dense(scale)
        cov_yx = self._sum_yx * scale
        cov_yy = None if self._sum_yy is None else self._sum_yy.dense(scale)
        var_x = cov_xx.diagonal()
        var_y = self._sum_y2 * scale if cov_yy is None else cov_yy.diagonal().clone()
        constant_x = _is_constant(self._mean_x, var_x)
        constant_y = _is_constant(self._mean_y, var_y)
        _zero(cov_xx, constant_x, constant_x)
        _zero(cov_yx, constant_y, constant_x)
        if cov_yy is not None:
            _zero(cov_yy, constant_y, constant_y)
        return CovarianceStats(
            num_tokens=self._num_tokens,
            mean_x=self._mean_x.clone(),
            mean_y=self._mean_y.clone(),
            cov_xx=cov_xx,
            cov_yx=cov_yx,
            cov_yy=cov_yy,
            var_y=var_y.masked_fill_(constant_y, 0.0),
        )

    def _matrices(self) -> list[Tensor]:
        """Return the sums as they are stored, for what is done to each value alone."""
        matrices = [self._sum_xx.values, self._sum_yx]
        return matrices if self._sum_yy is None else [*matrices, self._sum_yy.values]

    def _signature(self) -> tuple[int, int, bool]:
        d_out, d_in = self._sum_yx.shape
        return d_in, d_out, self._sum_yy is not None

    def _centred(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return the batch in float64, less its mean, with one spare row; and the mean.
        """
        num_rows, width = batch.shape
        rows = torch.empty(
            num_rows + 1, width, dtype=torch.float64, device=self._device
        )
        # First to the device, then to float64: fewer bytes to move.
        rows[:num_rows] = batch.detach().to(self._device)
        mean = rows[:num_rows].mean(dim=0)
        rows[:num_rows] -= mean
        return rows, mean

    def _centred_half(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch less its mean in bfloat16; and the mean in float64."""
        rows = batch.detach().to(self._device)
        mean = rows.mean(dim=0, dtype=torch.float64)
        return (rows - mean.float()).bfloat16(), mean

    def _join(
        self, count: int, mean_x: Tensor, mean_y: Tensor, rows_x: Tensor, rows_y: Tensor
    ) -> None:
        """
        Add ``count`` rows centred on their means; overwrites the spare last rows.

        ``n m / (n + m) (b - a)(b - a)^T`` is the product of one more row, so the
        correction rides along in the matrix products.
        """
        total = self._num_tokens + count
        weight = math.sqrt(self._num_tokens * count / total)
        shift_x, shift_y = mean_x - self._mean_x, mean_y - self._mean_y
        rows_x[-1], rows_y[-1] = shift_x * weight, shift_y * weight
        self._add_products(rows_x, rows_y)
        self._mean_x += shift_x * (count / total)
        self._mean_y += shift_y * (count / total)
        self._num_tokens = total

    def _add_products(self, rows_x: Tensor, rows_y: Tensor) -> None:
        """Add the products of centred rows, in float64 or bfloat16."""
        self._sum_xx.add_gram_(rows_x)
        add_cross_(self._sum_yx, rows_y, rows_x)
        if self._sum_yy is not None:
            self._sum_yy.add_gram_(rows_y)
        else:
            # Squared norms of columns: unlike (rows_y ** 2).sum(0), no temporary.
            norm = torch.linalg.vector_norm(rows_y, dim=0, dtype=torch.float64)
            self._sum_y2 += norm.square_()


def _check_batch(name: str, batch: Tensor, width: int) -> None:
    if batch.dim() != 2 or batch.shape[1] != width:
        raise ValueError(
            f"{name}: expected shape [num_tokens, {width}], got {tuple(batch.shape)}."
        )
    if not batch.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {batch.dtype}.")


def _non_finite_message(name: str, batch: Tensor) -> str:
    bad = (~batch.isfinite()).any(dim=1).nonzero().flatten()
    if bad.numel() == 0:
        return f"{name}: the sum of {batch.shape[0]} rows overflows float64."
    return (
        f"{name}: activations must be finite, got NaN or inf in {bad.numel()} of "
        f"{batch.shape[0]} rows, first in row {int(bad[0])}. Check the model's dtype "
        "(float16 overflows above 65504) and the calibration data."
    )


def _is_constant(mean: Tensor, variance: Tensor) -> Tensor:
    eps = torch.finfo(torch.float64).eps
    return variance <= (_CONSTANT_ULPS * eps * mean).square()


def _zero(cov: Tensor, rows: Tensor, columns: Tensor) -> None:
    # Left in, the rounding noise of a constant channel would be scaled up to unit
    # variance by the solver and get huge weights.
    if bool(rows.any()):
        cov[rows] = 0.0
    if bool(columns.any()):
        cov[:, columns] = 0.0
