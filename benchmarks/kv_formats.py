# SPDX-License-Identifier: Apache-2.0
"""What is read back of keys and values in benchmarks/kv_quantization.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ATTENTION = "kv_quantized"

Quantizer = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """
    How keys and values are stored.

    :param key: what is read back of keys ``[..., head_dim]``
    :param value: of values, same shape
    :param protects: how many layers at each end stay as they are
    """

    key: Quantizer
    value: Quantizer
    protects: int = 0


def as_is(x: Tensor) -> Tensor:
    """Return what was stored."""
    return x


def fp8(x: Tensor) -> Tensor:
    """Return e4m3 with vLLM's default scale, 1."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype)


def int8_per_token_head(x: Tensor) -> Tensor:
    """Return symmetric INT8, a scale for each token and head."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return (x / scale).round().clamp(-128, 127) * scale


def uniform(x: Tensor, bits: int) -> Tensor:
    """
    Return levels between the least and the greatest of each token and head.

    :param bits: per number
    """
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    levels = 2**bits - 1
    scale = ((greatest - least) / levels).clamp(min=1e-8)
    # both are stored in float16
    codes = ((x - least) / scale).round().clamp(0, levels)
    return codes * scale.half().to(x.dtype) + least.half().to(x.dtype)


def int4_per_token_head(x: Tensor) -> Tensor:
    """Return INT4 with a zero point in 4 bits, of the vector after vLLM's rotation."""
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    rotated = single_rht(x)
    least, greatest = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
    scale = ((greatest - least) / 15).clamp(min=1e-6)
    zero = (-least / scale).round().clamp(0, 15)
    codes = (rotated / scale + zero).round().clamp(0, 15)
    return single_rht((codes - zero) * scale, inverse=True) / x.shape[-1]


def nearest_centroids(x: Tensor, bits: int) -> Tensor:
    """
    Return TurboQuant's keys: norms, and directions by their nearest centroids after a
    Hadamard rotation, normalized again.

    :param bits: per number
    """
    from vllm.model_executor.layers.quantization.turboquant.centroids import (
        get_centroids,
    )
    from vllm.v1.attention.ops.int4_per_token_head import fast_hadamard_transform

    d = x.shape[-1]
    centroids = get_centroids(d, bits).to(x.dtype)
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    norms = x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    rotated = fast_hadamard_transform(x / norms) / math.sqrt(d)
    near = centroids[torch.bucketize(rotated.contiguous(), midpoints, right=True)]
    near = near / near.norm(dim=-1, keepdim=True)
    back = fast_hadamard_transform(near) / math.sqrt(d)
    return back * norms.half().to(x.dtype)


FORMATS = {
    "auto": Format(as_is, as_is),
    "fp8": Format(fp8, fp8),
    "int8_per_token_head": Format(int8_per_token_head, int8_per_token_head),
    "int4_per_token_head": Format(int4_per_token_head, int4_per_token_head),
    "turboquant_k8v4": Format(fp8, lambda x: uniform(x, 4), 2),
    "turboquant_4bit_nc": Format(
        lambda x: nearest_centroids(x, 4), lambda x: uniform(x, 4), 2
    ),
}


def quantize_cache(model: Any, stored: Format) -> None:
    """
    Have a transformers model read keys and values as a format stores them.

    :param model: changes
    :param stored: the format
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    count = model.config.num_hidden_layers
    protected = {*range(stored.protects), *range(count - stored.protects, count)}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        if module.layer_idx not in protected:
            key, value = stored.key(key), stored.value(value)
        return sdpa_attention_forward(module, query, key, value, *args, **kw)

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
