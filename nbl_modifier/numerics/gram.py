# SPDX-License-Identifier: Apache-2.0
"""
Matrix products ``A^T B`` added to float64 sums, ``A^T A`` at about half the cost.
torch has no ``syrk``, so the lower triangle is filled panel by panel.
"""

import torch
from torch import Tensor

# Rows of the result per matrix product. The work is d^2/2 + d * panel/2 instead of
# d^2, so smaller is less work; below this the products get too thin to run at speed.
_PANEL = 256
_CUDA_PANEL = 1024
# Rows of bfloat16 that are added up in float32 before they go to float64: more rows
# lose digits, fewer make reading and writing the sums the larger part of the work.
_CHUNK = 16384


def add_gram_(total: Tensor, rows: Tensor) -> Tensor:
    """
    Add ``rows^T rows`` to the lower triangle of ``total``, in place.

    Blocks on the diagonal are added whole, so entries above the diagonal are
    meaningless until :func:`mirror_lower_`.

    :param total: ``[d, d]``, written through views, never copied
    :param rows: ``[num_rows, d]``, on the device of ``total``; its dtype or bfloat16
    :return: ``total``
    """
    width = total.shape[0]
    panel = _CUDA_PANEL if total.is_cuda else _PANEL
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        # Whole rows left of the diagonal: consecutive memory for BLAS to write to.
        _add_product_(total[start:stop, :stop], rows[:, start:stop], rows[:, :stop])
    return total


def add_cross_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """
    Add ``left^T right`` to ``total``, in place.

    :param total: ``[d_left, d_right]``
    :param left: ``[num_rows, d_left]``, dtype and device as in :func:`add_gram_`
    :param right: ``[num_rows, d_right]``, likewise
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


def mirror_lower_(total: Tensor) -> Tensor:
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
