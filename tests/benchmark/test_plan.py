# SPDX-License-Identifier: Apache-2.0
"""A benchmark as far as it has come."""

from nbl_modifier.benchmark.plan import Cell, Settings
from nbl_modifier.benchmark.roofline import Kernel
from nbl_modifier.benchmark.timing import Timing
from tests.benchmark.benchmarks import make_benchmark


def test_a_skipped_cell_is_forgotten() -> None:
    benchmark = make_benchmark()
    timing = Timing(1.0, 1.0, 4, 18.0, None)
    benchmark.timings = {Cell(16, 1): ([timing], []), Cell(16, 2): ([timing], [timing])}
    benchmark.skip(Cell(16, 1), "no room")
    benchmark.skip(Cell(32, 1), "too long")
    assert benchmark.skipped == {Cell(16, 1): "no room", Cell(32, 1): "too long"}
    assert benchmark.timings.keys() == {Cell(16, 2)}


def test_kernel_is_the_engines() -> None:
    assert Settings("vllm", attention="eager").kernel is Kernel.PAGED
    assert Settings("transformers", attention="eager").kernel is Kernel.EAGER
    assert Settings("transformers").kernel is Kernel.SDPA
