# SPDX-License-Identifier: Apache-2.0
"""What does not fit in memory or in the time allowed, told before it is tried."""

from __future__ import annotations

import math

from .plan import Benchmark, Cell, Settings
from .roofline import Kernel, Machine, decode_works, prefill_works, total_seconds
from .shapes import Model

__all__ = ["fit_together", "largest_batch", "predicted_seconds", "reason_to_skip"]

# Embedding, buffers and what loading needs, over the weights that are multiplied.
_LOADING = 1.3
# Of the memory that is free; the rest is for activations.
_USABLE = 0.8


def fit_together(
    models: tuple[Model, Model], settings: Settings, free: int | None
) -> bool:
    """
    Return whether both engines can be in memory at once.

    :param models: the two models
    :param settings: how they are to run
    :param free: bytes that can be allocated, or None if that is not known
    """
    if free is None:
        return True
    weights = [model.shape.weight_bytes * _LOADING for model in models]
    if settings.engine == "vllm" and settings.on_accelerator:
        # Each gets half, for weights and KV cache, and a cache of a fourth of that is
        # the least that is worth measuring.
        return max(weights) <= 0.75 * settings.memory_fraction * free / 2
    caches = 2 * (settings.kv_cache_gib or 1) * 2**30 * (settings.engine == "vllm")
    return sum(weights) + caches <= _USABLE * free


def reason_to_skip(cell: Cell, benchmark: Benchmark) -> str | None:
    """
    Return why the cell cannot be measured, or None if nothing speaks against it.

    :param cell: not skipped yet
    :param benchmark: with the engines that have been loaded so far
    """
    for number in sorted(benchmark.loaded):
        reason = _too_large(cell, benchmark, number) or _too_long(
            cell, benchmark, number
        )
        if reason is not None:
            return reason
    return None


def predicted_seconds(
    cell: Cell,
    benchmark: Benchmark,
    number: int,
    machine: Machine,
    cache_tokens: float,
) -> tuple[float, float]:
    """
    Return the roofline's seconds for the prefill and for one decode step.

    :param number: of the model, 0 for the base model
    :param machine: its peaks
    :param cache_tokens: tokens per sequence in the cache while decoding
    """
    shape = benchmark.models[number].shape
    kernel = benchmark.settings.kernel
    prefill = prefill_works(
        shape,
        batch=cell.batch,
        context=cell.context,
        kernel=kernel,
        tokens_per_pass=benchmark.loaded[number].tokens_per_pass,
    )
    step = decode_works(shape, batch=cell.batch, context=cache_tokens, kernel=kernel)
    return total_seconds(prefill, machine), total_seconds(step, machine)


def largest_batch(benchmark: Benchmark, number: int, length: int) -> int | None:
    """
    Return how many sequences fit in the KV cache at once; None: no fixed cache.

    :param number: of the model, 0 for the base model
    :param length: tokens of each sequence
    """
    loaded = benchmark.loaded[number]
    if loaded.kv_cache_tokens is None or loaded.block_size is None:
        return None
    blocks = math.ceil(length / loaded.block_size)
    return loaded.kv_cache_tokens // (blocks * loaded.block_size)


def _too_large(cell: Cell, benchmark: Benchmark, number: int) -> str | None:
    model, loaded = benchmark.models[number], benchmark.loaded[number]
    if loaded.kv_cache_tokens is not None:
        holds = largest_batch(benchmark, number, cell.context + benchmark.grid.generate)
        if holds is None or cell.batch <= holds:
            return None
        return (
            f"the KV cache of {model.name} holds {loaded.kv_cache_tokens:,} tokens, "
            f"{holds} such sequences"
        )
    needed = _bytes_in_transformers(cell, benchmark, number)
    if loaded.available_bytes is None or needed <= loaded.available_bytes:
        return None
    return (
        f"{model.name} would need about {needed / 1e9:,.1f} GB beside its weights, "
        f"{loaded.available_bytes / 1e9:,.1f} GB are left"
    )


def _bytes_in_transformers(cell: Cell, benchmark: Benchmark, number: int) -> float:
    """Return what transformers allocates at most beside the weights, roughly."""
    shape, tokens = benchmark.models[number].shape, cell.batch * cell.context
    length = cell.context + benchmark.grid.generate
    cache = cell.batch * shape.cache_bytes(length)
    widest = max(p.inputs + p.outputs for p in shape.products if not p.last_only)
    # Gate, up and their product live at once.
    activations = 3.0 * tokens * widest * shape.activation_bytes
    scores = 0.0
    if benchmark.settings.kernel is Kernel.EAGER:
        heads = max((a.query_heads for a in shape.attentions), default=0)
        # Scores in the model's dtype and twice in float32.
        each = shape.activation_bytes + 2 * 4
        scores = float(each) * heads * cell.batch * cell.context**2
    return cache + activations + scores


def _too_long(cell: Cell, benchmark: Benchmark, number: int) -> str | None:
    grid = benchmark.grid
    prefill, step = predicted_seconds(
        cell,
        benchmark,
        number,
        benchmark.loaded[number].peaks,
        cell.context + grid.generate / 2,
    )
    seconds = prefill + grid.generate * step
    if seconds <= grid.max_seconds:
        return None
    return (
        f"{seconds:,.0f} s per round at the machine's peak, --max-seconds is "
        f"{grid.max_seconds:,.0f}"
    )
