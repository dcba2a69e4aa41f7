# SPDX-License-Identifier: Apache-2.0
"""From timings to speeds, by hand."""

import pytest

from nbl_modifier.benchmark.plan import Cell
from nbl_modifier.benchmark.roofline import Machine
from nbl_modifier.benchmark.summary import make_report
from nbl_modifier.benchmark.timing import Timing
from tests.benchmark.benchmarks import make_benchmark, make_loaded


def test_speeds_are_tokens_of_all_sequences_over_seconds() -> None:
    benchmark = make_benchmark()
    benchmark.timings[Cell(16, 3)] = (
        [Timing(2.0, 4.0, 8, 18.0, 64.0), Timing(1.0, 2.0, 8, 18.0, 64.0)],
        [Timing(0.5, 1.0, 8, 18.0, 32.0), Timing(0.5, 1.0, 8, 18.0, 32.0)],
    )
    benchmark.skip(Cell(32, 1), "too long")
    report = make_report(benchmark)
    prefill, decode = report.rows
    assert (prefill.phase, prefill.generated) == ("prefill", 0)
    assert prefill.base == [24.0, 48.0]  # 3 x 16 tokens in 2 and 1 seconds
    assert prefill.compressed == [96.0, 96.0]
    assert (decode.phase, decode.generated) == ("decode", 8)
    assert decode.base == [6.0, 12.0]  # 3 sequences, 8 steps in 4 and 2 seconds
    assert decode.compressed == [24.0, 24.0]
    assert [cell.reason for cell in report.skipped] == ["too long"]
    assert report.base.measured_kv_bytes_per_token == 64.0
    assert report.compressed.linearized == [1]
    assert report.capacity.ratio is None


def test_peaks_are_the_best_that_were_seen() -> None:
    benchmark = make_benchmark()
    benchmark.loaded[0] = make_loaded(peaks=Machine(4.0, 1.0))
    benchmark.loaded[1] = make_loaded(peaks=Machine(2.0, 3.0))
    machine = make_report(benchmark).machine
    assert machine["flops_per_second"] == 4.0
    assert machine["bytes_per_second"] == 3.0


def test_capacity_is_in_whole_sequences() -> None:
    """16 and 4 tokens: 2 blocks of 16, of which there are 10 and 20."""
    benchmark = make_benchmark()
    for number, tokens in ((0, 160), (1, 320)):
        benchmark.loaded[number] = make_loaded(kv_cache_tokens=tokens, block_size=16)
    capacity = make_report(benchmark).capacity
    assert capacity.ratio == pytest.approx(2.0)
    assert capacity.largest_batch == {"16": [5, 10]}
    assert capacity.predicted_ratio is None  # neither has attention
