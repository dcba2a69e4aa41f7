# SPDX-License-Identifier: Apache-2.0
"""
Symmetric products ``A^T A`` at about half the cost of a full matrix product.
torch has no ``syrk``, so the lower triangle is filled panel by panel.
"""

from torch import Tensor

# Rows of the result per matrix product. The work is d^2/2 + d * _PANEL/2 instead of
# d^2, so smaller is less work; below 256 the products get too thin to run at speed.
_PANEL = 256


def add_gram_(total: Tensor, rows: Tensor) -> Tensor:
    """
    Add ``rows^T rows`` to the lower triangle of ``total``, in place.

    Blocks on the diagonal are added whole, so entries above the diagonal are
    meaningless until :func:`mirror_lower_`.

    :param total: ``[d, d]``, written through views, never copied
    :param rows: ``[num_rows, d]``, same dtype and device as ``total``
    :return: ``total``
    """
    width = total.shape[0]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        # Whole rows left of the diagonal: consecutive memory for BLAS to write to.
        total[start:stop, :stop].addmm_(rows[:, start:stop].mT, rows[:, :stop])
    return total


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
