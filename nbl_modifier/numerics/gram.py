# SPDX-License-Identifier: Apache-2.0
"""
Matrix products ``A^T B`` added to float64 sums; ``A^T A`` at about half the cost and in
half the memory. torch has no ``syrk``, so the triangle is filled panel by panel.
"""

from typing import Self

import torch
from torch import Tensor

# Rows of the result per matrix product. The work is d^2/2 + d * panel/2 instead of
# d^2, so smaller is less work; below this the products get too thin to run at speed.
_PANEL = 256
_CUDA_PANEL = 1024
# Rows of bfloat16 that are added up in float32 before they go to float64: more rows
# lose digits, fewer make reading and writing the sums the larger part of the work.
_CHUNK = 16384


class PackedSymmetric:
    """
    A symmetric matrix, such as a sum of ``A^T A``, in ``d (d + 1) / 2`` values.

    Rectangular full packed format (Gustavson et al., ACM TOMS 37(2), 2010,
    doi:10.1145/1731022.1731028): the lower half of the rows, up to the diagonal, leaves
    room beyond it for the triangle of the upper half, transposed. Both are strided
    matrices that BLAS adds to in place.

    :param values: ``[ceil(d / 2), d + 1 - d % 2]``, float64; kept, not copied
    """

    def __init__(self, values: Tensor) -> None:
        bottom, columns = values.shape
        self._top = top = (columns - 1) // 2
        #: what can be stored, and added to that of other matrices of this width
        self.values = values
        self._lower = values[:, : top + bottom]  # rows from d // 2 on
        self._upper = values[:top, top + 1 :].mT  # the square before them

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Self:
        """
        Return the zero matrix.

        :param width: d
        :param device: where it lives
        """
        shape = (width + 1) // 2, width // 2 * 2 + 1
        return cls(torch.zeros(shape, dtype=torch.float64, device=device))

    @classmethod
    def pack(cls, matrix: Tensor) -> Self:
        """
        Return ``matrix``, packed.

        :param matrix: ``[d, d]``, float64, symmetric; only the lower triangle is read
        """
        packed = cls.zeros(matrix.shape[0], matrix.device)
        top = packed._top
        packed._lower[:, :top] = matrix[top:, :top]
        packed._lower[:, top:] = matrix[top:, top:].tril()
        packed._upper += matrix[:top, :top].tril()
        return packed

    def add_gram_(self, rows: Tensor) -> None:
        """
        Add ``rows^T rows``.

        :param rows: ``[num_rows, d]``, float64 or bfloat16
        """
        _add_up_to_diagonal_(self._upper, rows[:, : self._top])
        _add_up_to_diagonal_(self._lower, rows)

    def dense(self, scale: float = 1.0) -> Tensor:
        """
        Return the matrix times ``scale``, ``[d, d]``, bitwise symmetric.

        :param scale: dimensionless
        """
        top, width = self._top, self._lower.shape[1]
        full = self.values.new_empty(width, width)
        full[:top, :top] = self._upper
        full[top:] = self._lower
        return _mirror_lower_(full.mul_(scale))


def _add_up_to_diagonal_(total: Tensor, rows: Tensor) -> None:
    """
    Add the last rows of ``rows^T rows``, each up to the diagonal; leave the rest alone.

    :param total: ``[r, d]``, r <= d, float64, consecutive along one of its dimensions
    :param rows: ``[num_rows, d]``, float64 or bfloat16
    """
    height, width = total.shape
    panel = _CUDA_PANEL if total.is_cuda else _PANEL
    for start in range(0, height, panel):
        end = min(start + panel, height)
        first, last = width - height + start, width - height + end
        # The product takes in the square on the diagonal whole: one product too small
        # to run at speed less. What it does above the diagonal is undone.
        square = total[start:end, first:last]
        above = square.triu(1)
        _add_product_(total[start:end, :last], rows[:, first:last], rows[:, :last])
        square.tril_().add_(above)


def add_cross_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """
    Add ``left^T right`` to ``total``, in place.

    :param total: ``[d_left, d_right]``
    :param left: ``[num_rows, d_left]``, float64 or bfloat16, on the same device
    :param right: ``[num_rows, d_right]``, in the dtype of ``left``, on the same device
    :return: ``total``
    """
    if left.dtype == total.dtype:
        return total.addmm_(left.mT, right)
    # In panels for the sake of memory: the float32 product is as wide as the total.
    for start in range(0, total.shape[0], _CUDA_PANEL):
        part = slice(start, start + _CUDA_PANEL)
        _add_product_(total[part], left[:, part], right)
    return total


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.stride(0) == 1:  # for consecutive memory to write to
        total, left, right = total.mT, right, left
    if left.dtype == total.dtype:
        total.addmm_(left.mT, right)
        return
    for a, b in zip(left.split(_CHUNK), right.split(_CHUNK), strict=True):
        total += _float32_product(a.mT, b)


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """
    Return the product of bfloat16 matrices, added up in float32.

    A product of two bfloat16 numbers is exact in float32, so only the sum rounds.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _mirror_lower_(total: Tensor) -> Tensor:
    """
    Copy the lower triangle of ``total`` onto the upper one, in place.

    :param total: ``[d, d]``; bitwise symmetric afterwards
    :return: ``total``
    """
    width = total.shape[0]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        total[:start, start:stop] = total[start:stop, :start].mT
        block = total[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)
    return total
