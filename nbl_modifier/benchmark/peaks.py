# SPDX-License-Identifier: Apache-2.0
"""The machine's peaks, measured with torch in the process that runs the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from .roofline import Machine
from .timing import now

__all__ = ["measure_peaks"]

_SQUARE = 2048
# Beyond this no cache holds it, and a larger one would tell nothing else.
_LARGEST_BUFFER = 2**30
_ROUNDS = 7
# Long enough for the clock, short enough that a busy machine leaves some rounds alone.
_ROUND_SECONDS = 0.05


def measure_peaks(device: str, dtype: torch.dtype, working_set: float) -> Machine:
    """
    Return the best speeds that torch reaches on this machine now.

    Operations: a square matrix product. Bytes: the faster of a copy and a
    matrix-vector product over as much memory as the model's weights take, so that the
    bandwidth is the cache's where the model fits in a cache.

    :param device: such as ``cpu`` or ``cuda``
    :param dtype: of the model
    :param working_set: bytes
    """
    square = torch.empty(_SQUARE, _SQUARE, device=device, dtype=dtype).uniform_()
    product = _best_seconds(lambda: square @ square, device)
    size = min(working_set, _LARGEST_BUFFER)
    rows = max(2, int(size) // (_SQUARE * square.element_size()))
    matrix = torch.empty(rows, _SQUARE, device=device, dtype=dtype).uniform_()
    source, target = matrix[: rows // 2], matrix[rows - rows // 2 :]
    vector = square[:1]
    multiply = _best_seconds(lambda: linear(vector, matrix), device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Machine(
        flops_per_second=2.0 * _SQUARE**3 / product,
        bytes_per_second=max(matrix.nbytes / multiply, 2 * source.nbytes / copy),
    )


def _best_seconds(action: Callable[[], object], device: str) -> float:
    """Return the least time of one call, over rounds of many."""
    action()
    calls, best = 1, float("inf")
    for _ in range(_ROUNDS):
        started_at = now(device)
        for _ in range(calls):
            action()
        seconds = (now(device) - started_at) / calls
        best = min(best, seconds)
        calls = max(1, int(_ROUND_SECONDS / best))
    return best
