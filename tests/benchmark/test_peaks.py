# SPDX-License-Identifier: Apache-2.0
"""Peaks are of this machine, and times are those of one call."""

import time

import pytest
import torch

from nbl_modifier.benchmark.peaks import _best_seconds, measure_peaks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_time_is_that_of_one_call_at_best() -> None:
    """The first call is not timed, and neither is what other calls take longer."""
    seconds = iter([0.5, *[0.02, 0.01] * 1000])
    best = _best_seconds(lambda: time.sleep(next(seconds)), "cpu")
    assert 0.01 <= best < 0.5


def test_peaks_are_those_of_a_product_and_a_copy() -> None:
    """No slower than a tenth of one product measured here, beside other work."""
    peaks = measure_peaks("cpu", torch.float32, 1e6)
    square = torch.ones(512, 512)
    square @ square
    start = time.perf_counter()
    square @ square
    once = 2.0 * 512**3 / (time.perf_counter() - start)
    assert peaks.flops_per_second > once / 10
    assert peaks.bytes_per_second > 1e8
