# SPDX-License-Identifier: Apache-2.0
"""
What inference would cost if nothing but arithmetic and memory traffic took time.

Each part of the model takes the longer of two times: its floating-point operations at
the machine's peak, or its bytes at the machine's bandwidth (Williams, Waterman and
Patterson, CACM 52, 2009). The parts run one after the other. Counted are

- matrix products: two operations per weight and row; the weights are read once per
  forward pass, the input rows are read and the output rows written once;
- attention: two products over the positions that a token sees, and the traffic of the
  key-value cache in the kernel at hand (:class:`Kernel`).

Not counted: norms, activation functions, rotary embedding, sampling, and the time
between kernels. What a measurement falls short of the prediction is in those, or lost.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable

__all__ = [
    "AttentionShape",
    "Kernel",
    "Machine",
    "ModelShape",
    "Product",
    "Work",
    "decode_works",
    "prefill_works",
    "total_seconds",
]


class Kernel(enum.StrEnum):
    """
    How attention is computed, which decides what it reads and writes.

    ``PAGED``, vLLM: one fused kernel, the cache is read and each new entry written
    once. ``SDPA``, transformers: fused as well, but ``DynamicCache`` copies the cache
    to append to it. ``EAGER``, transformers: the copy; keys and values repeated for
    each query head; and every score passes through memory several times, the masked
    half of a prefill included.
    """

    PAGED = "paged"
    SDPA = "sdpa"
    EAGER = "eager"


@dataclasses.dataclass(frozen=True)
class Machine:
    """
    Peaks of the machine, in the dtype of the model.

    :param flops_per_second: floating-point operations per second
    :param bytes_per_second: memory bandwidth
    """

    flops_per_second: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Work:
    """
    One part of a forward pass.

    :param flops: floating-point operations; a multiply-add is two
    :param bytes: read and written
    """

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """Return the time on ``machine`` at best."""
        return max(
            self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second
        )


@dataclasses.dataclass(frozen=True)
class Product:
    """
    A weight matrix, or the matrices of one kind of all experts of a layer.

    :param name: module, the experts' number left out
    :param inputs: width of a row that goes in
    :param outputs: width of a row that comes out
    :param nbytes: of the weight with its scales, all experts together
    :param experts: matrices of this shape, of which a router picks ``active``; 1 and 1
        for an ordinary layer
    :param active: matrices that each row is multiplied by
    :param last_only: whether only the last position of a sequence is multiplied, as
        by the head
    """

    name: str
    inputs: int
    outputs: int
    nbytes: float
    experts: int = 1
    active: int = 1
    last_only: bool = False

    def work(self, rows: float, activation_bytes: int) -> Work:
        """
        Return the work of one multiplication.

        :param rows: tokens in the batch
        :param activation_bytes: of one activation
        """
        # Expected part of the experts that some row needs, the rows' choices taken as
        # independent and even.
        used = 1.0 - (1.0 - self.active / self.experts) ** rows
        passes = rows * self.active
        return Work(
            flops=2.0 * passes * self.inputs * self.outputs,
            bytes=used * self.nbytes
            + passes * (self.inputs + self.outputs) * activation_bytes,
        )


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """
    Attention of one decoder layer that has any.

    :param query_heads: query heads
    :param kv_heads: key-value heads
    :param head_dim: width of a head
    :param window: positions a token sees at most; None: all before it
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def seen(self, context: float) -> float:
        """Return how many positions a token sees that has ``context`` before it."""
        return context if self.window is None else min(context, self.window)

    def cache_elements(self, context: float) -> float:
        """Return the keys' and values' elements of one sequence."""
        return 2.0 * self.kv_heads * self.head_dim * self.seen(context)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """
    What the prediction needs to know of a model.

    :param products: its matrix products, in any order
    :param attentions: its attention layers; linearized layers are not among them
    :param activation_bytes: of one activation
    :param kv_bytes: of one element of the key-value cache
    """

    products: tuple[Product, ...]
    attentions: tuple[AttentionShape, ...]
    activation_bytes: int
    kv_bytes: int

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights that are multiplied."""
        return sum(product.nbytes for product in self.products)

    def cache_bytes(self, context: float) -> float:
        """Return the bytes of the key-value cache of one sequence."""
        elements = sum(each.cache_elements(context) for each in self.attentions)
        return elements * self.kv_bytes


def prefill_works(
    shape: ModelShape,
    *,
    batch: int,
    context: int,
    kernel: Kernel,
    tokens_per_pass: int | None = None,
) -> list[Work]:
    """
    Return the parts of reading ``batch`` prompts of ``context`` tokens each.

    :param tokens_per_pass: tokens that the engine puts into one forward pass; each pass
        reads the weights again. None: all at once
    """
    tokens = batch * context
    num_passes = math.ceil(tokens / (tokens_per_pass or tokens))
    works: list[Work] = []
    for product in shape.products:
        if product.last_only:
            works.append(product.work(batch, shape.activation_bytes))
        else:
            each = product.work(tokens / num_passes, shape.activation_bytes)
            works += [each] * num_passes
    works += [
        _prefill_attention(attention, shape, batch, context, kernel)
        for attention in shape.attentions
    ]
    return works


def decode_works(
    shape: ModelShape, *, batch: int, context: float, kernel: Kernel
) -> list[Work]:
    """
    Return the parts of one step that adds a token to each sequence.

    :param batch: sequences
    :param context: tokens each sequence has by then, the mean over the steps meant
    """
    works = [p.work(batch, shape.activation_bytes) for p in shape.products]
    works += [
        _decode_attention(attention, shape, batch, context, kernel)
        for attention in shape.attentions
    ]
    return works


def total_seconds(works: Iterable[Work], machine: Machine) -> float:
    """Return the time of all parts on ``machine``, one after the other, at best."""
    return sum(work.seconds(machine) for work in works)


def _score_bytes(activation_bytes: int) -> int:
    """
    Return the bytes that one attention score moves in transformers' eager attention.

    ``matmul * scaling + mask``, softmax in float32, matmul (transformers 5.17,
    models/llama/modeling_llama.py, ``eager_attention_forward``): written by the first
    product, read and written by scaling and by the mask, read by the last product. In
    float32 softmax reads and writes once; from a narrower dtype it is converted before
    and after.
    """
    softmax = 2 * 4
    if activation_bytes < 4:
        softmax += 2 * (activation_bytes + 4)
    return 6 * activation_bytes + softmax


def _prefill_attention(
    attention: AttentionShape,
    shape: ModelShape,
    batch: int,
    context: int,
    kernel: Kernel,
) -> Work:
    a = attention
    window = a.seen(context)
    # Positions seen, summed over the tokens of a sequence; all of them where the
    # masked half is computed too.
    scores = window * (window + 1) / 2 + (context - window) * window
    if kernel is Kernel.EAGER:
        scores = float(context) ** 2
    scores *= batch * a.query_heads
    rows = 2.0 * batch * context * (a.query_heads + a.kv_heads) * a.head_dim
    traffic = rows * shape.activation_bytes  # q, k, v in, output out
    traffic += batch * a.cache_elements(context) * shape.kv_bytes
    if kernel is Kernel.EAGER:
        traffic += scores * _score_bytes(shape.activation_bytes)
        traffic += batch * _repeat_bytes(a, shape, context)
    return Work(flops=4.0 * scores * a.head_dim, bytes=traffic)


def _decode_attention(
    attention: AttentionShape,
    shape: ModelShape,
    batch: int,
    context: float,
    kernel: Kernel,
) -> Work:
    a = attention
    scores = batch * a.query_heads * a.seen(context)
    cache = batch * a.cache_elements(context) * shape.kv_bytes
    traffic = cache  # read by attention
    if kernel is not Kernel.PAGED:
        traffic += 2.0 * cache  # read and written to append a token
    if kernel is Kernel.EAGER:
        traffic += scores * _score_bytes(shape.activation_bytes)
        traffic += batch * _repeat_bytes(a, shape, context)
    return Work(flops=4.0 * scores * a.head_dim, bytes=traffic)


def _repeat_bytes(a: AttentionShape, shape: ModelShape, context: float) -> float:
    """Return what repeating one sequence's keys and values per query head moves."""
    if a.query_heads == a.kv_heads:
        return 0.0
    # The copy is written and read; the cache is read to make it, instead of by the
    # products, so that this read is counted already.
    return (
        2.0
        * a.query_heads
        / a.kv_heads
        * a.cache_elements(context)
        * shape.activation_bytes
    )
