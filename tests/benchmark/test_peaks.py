# SPDX-License-Identifier: Apache-2.0
"""Peaks are of this machine, and times are those of one call."""

import time
from collections.abc import Callable

import pytest
import torch

from nbl_modifier.benchmark import peaks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_time_is_that_of_one_call_at_best() -> None:
    """The first call is not timed, and neither is what other calls take longer."""
    seconds = iter([0.5, *[0.02, 0.01] * 1000])
    best = peaks._best_seconds(lambda: time.sleep(next(seconds)), "cpu")
    assert 0.01 <= best < 0.5


@pytest.mark.parametrize(
    ("multiply", "copy", "fastest"), [(0.5, 8.0, 2.0), (4.0, 0.25, 4.0)]
)
def test_peaks_are_operations_and_bytes_over_seconds(
    monkeypatch: pytest.MonkeyPatch, multiply: float, copy: float, fastest: float
) -> None:
    """
    Of a square product of 2048, and of 64 MiB: read once by a product with a vector,
    and half of it read and written by a copy.
    """
    seconds = iter([0.25, multiply, copy])
    done: list[object] = []

    def timed(action: Callable[[], object], device: str) -> float:
        done.append(action())
        return next(seconds)

    monkeypatch.setattr(peaks, "_best_seconds", timed)
    measured = peaks.measure_peaks("cpu", torch.float32, 2.0**26)
    assert measured.flops_per_second == 2.0 * 2048**3 / 0.25
    assert measured.bytes_per_second == fastest * 2.0**26
    assert len(done) == 3
