# SPDX-License-Identifier: Apache-2.0
"""A benchmark made by hand: two models of one matrix, and what was loaded."""

from typing import Any

from nbl_modifier.benchmark.plan import Benchmark, Grid, Settings
from nbl_modifier.benchmark.roofline import Machine, ModelShape, Product
from nbl_modifier.benchmark.serving import Loaded
from nbl_modifier.benchmark.shapes import Model


def make_loaded(**changes: Any) -> Loaded:
    """Return an engine without limits on a fast machine; ``changes`` are fields."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "kv_cache_tokens": None,
        "block_size": None,
        "tokens_per_pass": None,
        "available_bytes": None,
        "device": "cpu",
        "threads": 2,
        "peaks": Machine(1e12, 1e12),
        "load_seconds": 1.5,
    }
    return Loaded(**{**fields, **changes})


def make_benchmark(
    loaded: Loaded | None = None, *, max_seconds: float = 1e9
) -> Benchmark:
    """Return a benchmark of 4 generated tokens in which both engines are loaded."""
    product = Product("lm_head", 10, 20, nbytes=800.0)
    shape = ModelShape((product,), (), activation_bytes=4, kv_bytes=4)
    models = [
        Model(f"model {number}", shape, "float32", 2, (1,) * number, 64, 10)
        for number in (0, 1)
    ]
    grid = Grid((16,), (1,), generate=4, rounds=2, max_seconds=max_seconds)
    benchmark = Benchmark((models[0], models[1]), grid, Settings("transformers"))
    for number in (0, 1):
        benchmark.loaded[number] = loaded or make_loaded()
    return benchmark
