# SPDX-License-Identifier: Apache-2.0
"""The roofline against counts by hand, and against torch's own count of operations."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nbl_modifier.benchmark.roofline import (
    AttentionShape,
    Kernel,
    Machine,
    ModelShape,
    Product,
    Work,
    decode_works,
    prefill_works,
    total_seconds,
)
from nbl_modifier.benchmark.shapes import load_model
from tests.tiny_llama import load

# One layer of width 8: two query heads of 4, one of keys and values.
ATTENTION = AttentionShape(query_heads=2, kv_heads=1, head_dim=4)
PRODUCTS = (
    Product("layers.0.self_attn.qkv", inputs=8, outputs=16, nbytes=256),
    Product("lm_head", inputs=8, outputs=100, nbytes=1600, last_only=True),
)
SHAPE = ModelShape(PRODUCTS, (ATTENTION,), activation_bytes=2, kv_bytes=2)
COMPUTE_BOUND = Machine(flops_per_second=1.0, bytes_per_second=math.inf)
MEMORY_BOUND = Machine(flops_per_second=math.inf, bytes_per_second=1.0)


def total(works: list[Work]) -> tuple[float, float]:
    return sum(work.flops for work in works), sum(work.bytes for work in works)


def test_a_decode_step_by_hand() -> None:
    flops, nbytes = total(decode_works(SHAPE, batch=3, context=10, kernel=Kernel.PAGED))
    assert flops == 2 * 3 * (8 * 16 + 8 * 100) + 4 * 3 * 2 * 10 * 4
    products = 256 + 3 * (8 + 16) * 2 + 1600 + 3 * (8 + 100) * 2
    assert nbytes == products + 3 * 2 * 10 * 4 * 2  # keys and values, read once


def test_a_prefill_by_hand() -> None:
    works = prefill_works(SHAPE, batch=3, context=10, kernel=Kernel.PAGED)
    flops, _ = total(works)
    seen = 10 * 11 / 2  # token t sees t positions
    assert flops == 2 * 30 * 8 * 16 + 2 * 3 * 8 * 100 + 4 * 3 * 2 * seen * 4


def test_a_window_limits_what_is_seen() -> None:
    shape = replace(SHAPE, attentions=(replace(ATTENTION, window=4),))
    (_, _, prefill) = prefill_works(shape, batch=1, context=10, kernel=Kernel.PAGED)
    assert prefill.flops == 4 * 2 * (1 + 2 + 3 + 7 * 4) * 4
    (_, _, decode) = decode_works(shape, batch=1, context=10, kernel=Kernel.PAGED)
    assert decode.flops == 4 * 2 * 4 * 4
    assert shape.cache_bytes(10) == 2 * 4 * 4 * 2


def test_each_pass_of_a_prefill_reads_the_weights() -> None:
    def weight_reads(tokens_per_pass: int | None) -> float:
        works = prefill_works(
            SHAPE,
            batch=4,
            context=16,
            kernel=Kernel.PAGED,
            tokens_per_pass=tokens_per_pass,
        )
        return total(works)[1]

    assert weight_reads(16) - weight_reads(None) == 3 * 256
    assert total(prefill_works(SHAPE, batch=4, context=16, kernel=Kernel.PAGED))[
        0
    ] == pytest.approx(
        total(
            prefill_works(
                SHAPE, batch=4, context=16, kernel=Kernel.PAGED, tokens_per_pass=16
            )
        )[0]
    )


def test_transformers_kernels_cost_more_than_a_paged_one() -> None:
    """A cache that is copied to append to it is read twice more and written once."""
    cache = 2 * 10 * 4 * 2
    paged, sdpa, eager = (
        decode_works(SHAPE, batch=1, context=10, kernel=kernel)[-1]
        for kernel in (Kernel.PAGED, Kernel.SDPA, Kernel.EAGER)
    )
    assert sdpa.bytes == paged.bytes + 2 * cache
    # Two query heads share each key: the copy for both is written and read.
    assert eager.bytes > sdpa.bytes + 2 * 2 * cache
    assert paged.flops == sdpa.flops == eager.flops


def test_time_is_the_longer_of_arithmetic_and_traffic() -> None:
    machine = Machine(flops_per_second=10.0, bytes_per_second=5.0)
    assert Work(flops=20.0, bytes=5.0).seconds(machine) == 2.0
    assert Work(flops=20.0, bytes=50.0).seconds(machine) == 10.0
    # One after the other: the parts' limits differ.
    assert total_seconds([Work(20.0, 5.0), Work(20.0, 50.0)], machine) == 12.0


def test_experts_are_read_as_far_as_the_rows_need_them() -> None:
    layer = Product("experts", 8, 8, nbytes=800, experts=8, active=2)
    assert layer.work(1, 2).flops == 2 * 2 * 8 * 8
    assert layer.work(1, 2).bytes == 200 + 2 * 16 * 2
    assert layer.work(1000, 2).bytes == pytest.approx(800 + 1000 * 2 * 16 * 2)


def test_ratio_at_the_limits() -> None:
    """m of K layers: attention's cost falls by m / K, whatever binds."""
    keep = [ATTENTION] * 8
    base = ModelShape((), tuple(keep), 2, 2)
    compressed = ModelShape((), tuple(keep[:5]), 2, 2)
    for machine in (COMPUTE_BOUND, MEMORY_BOUND):
        times = [
            total_seconds(
                decode_works(shape, batch=2, context=64, kernel=Kernel.PAGED), machine
            )
            for shape in (base, compressed)
        ]
        assert times[0] / times[1] == 8 / 5


@pytest.mark.parametrize("random_weights", [False, True])
def test_operations_are_those_that_torch_counts(
    llama: Path, random_weights: bool
) -> None:
    """A whole forward pass of a real model, its head on the last position only."""
    model = load_model(str(llama), "auto", random_weights=random_weights)
    tokens = torch.ones(3, 20, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        load(llama, attn_implementation="eager")(tokens, logits_to_keep=1)
    works = prefill_works(model.shape, batch=3, context=20, kernel=Kernel.EAGER)
    # Torch counts rotary embedding's outer product as a matrix product of inner size 1,
    # head_dim / 2 frequencies by 20 positions, once.
    rotary = 2 * 4 * 20
    assert total(works)[0] == counter.get_total_flops() - rotary
