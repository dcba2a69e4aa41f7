# SPDX-License-Identifier: Apache-2.0
"""What does not fit in memory or time, against arithmetic by hand."""

from typing import Any

import pytest

from nbl_modifier.benchmark.limits import (
    fit_together,
    largest_batch,
    predicted_seconds,
    reason_to_skip,
)
from nbl_modifier.benchmark.plan import Cell, Settings
from nbl_modifier.benchmark.roofline import Machine, ModelShape, Product
from nbl_modifier.benchmark.shapes import Model
from tests.benchmark.benchmarks import make_benchmark, make_loaded


@pytest.mark.parametrize(
    ("engine", "accelerated", "free", "expected"),
    [
        # two models of 1 GB: 2.6 GB to load them, in four fifths of what is free
        ("transformers", False, 3.3e9, True),
        ("transformers", False, 3.2e9, False),
        # and 2 GiB of KV cache for each
        ("vllm", False, 8.7e9, True),
        ("vllm", False, 8.6e9, False),
        # half of the accelerator each, a quarter of that for the KV cache
        ("vllm", True, 3.9e9, True),
        ("vllm", True, 3.8e9, False),
        ("vllm", True, None, True),
    ],
)
def test_models_are_loaded_at_once_if_they_fit(
    engine: Any, accelerated: bool, free: Any, expected: bool
) -> None:
    weight = Product("lm_head", 1, 1, nbytes=1e9, last_only=True)
    shape = ModelShape((weight,), (), activation_bytes=2, kv_bytes=2)
    model = Model("a model", shape, "bfloat16", 1, (), 64, 10)
    settings = Settings(engine, kv_cache_gib=2, on_accelerator=accelerated)
    assert fit_together((model, model), settings, free) is expected


def test_blocks_of_the_cache_are_whole() -> None:
    """Of 10 blocks of 16 tokens, a sequence of 17 takes two."""
    benchmark = make_benchmark(make_loaded(kv_cache_tokens=160, block_size=16))
    assert [largest_batch(benchmark, 0, n) for n in (16, 17, 32, 33)] == [10, 5, 5, 3]


def test_no_cache_has_no_limit() -> None:
    assert largest_batch(make_benchmark(), 0, 16) is None


def test_what_the_cache_does_not_hold_is_named() -> None:
    """16 tokens and 4 generated ones take two blocks: 5 sequences of 10 blocks."""
    benchmark = make_benchmark(make_loaded(kv_cache_tokens=160, block_size=16))
    assert reason_to_skip(Cell(16, 5), benchmark) is None
    assert reason_to_skip(Cell(16, 6), benchmark) == (
        "the KV cache of model 0 holds 160 tokens, 5 such sequences"
    )


def test_what_memory_does_not_hold_is_named() -> None:
    benchmark = make_benchmark(make_loaded(available_bytes=10**6))
    assert reason_to_skip(Cell(16, 1), benchmark) is None
    reason = reason_to_skip(Cell(16, 10**6), benchmark)
    assert reason is not None
    assert "0.0 GB are left" in reason


def test_what_takes_too_long_is_named() -> None:
    """One product of 10 x 20: 400 operations a token at 1,000 a second."""
    slow = make_loaded(peaks=Machine(1e3, 1e12))
    benchmark = make_benchmark(slow, max_seconds=9.0)
    machine = slow.peaks
    prefill, step = predicted_seconds(Cell(16, 1), benchmark, 0, machine, 18.0)
    assert prefill == pytest.approx(16 * 0.4, rel=1e-6)
    assert step == pytest.approx(0.4, rel=1e-6)
    # 16 tokens read, 4 generated: 8 s; of 20 it is 9.6 s
    assert reason_to_skip(Cell(16, 1), benchmark) is None
    assert reason_to_skip(Cell(20, 1), benchmark) == (
        "10 s per round at the machine's peak, --max-seconds is 9"
    )
