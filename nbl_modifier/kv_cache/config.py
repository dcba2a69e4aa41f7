# SPDX-License-Identifier: Apache-2.0
"""What ``config.json`` says of the KV cache of each decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layers import LayerCache

__all__ = ["RECURRENT", "layer_caches"]

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
#: Kinds of layers that keep one state per sequence, whatever its length.
RECURRENT = ("linear_attention", "mamba", "mamba2")
_ATTENTION = ("full_attention", "sliding_attention", "attention", "chunked_attention")


def layer_caches(
    config: Mapping[str, Any],
) -> tuple[tuple[LayerCache | None, ...], int]:
    """
    Return what each decoder layer keeps, None without a cache, and bits per number.

    :param config: content of ``config.json``
    :raises ValueError: if the sizes are not in it
    """
    # that of a vision-language model is nested
    config = {**config, **(config.get("text_config") or {})} | {
        name: config[name]
        for name in ("nbl_config", "quantization_config", "num_hidden_layers")
        if name in config
    }
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [name for name in needed if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(
            f"config.json: no {', '.join(missing)}; its size is not computed here."
        )
    bits = _element_bits(config)
    count: int = config["num_hidden_layers"]
    kinds, special = _kinds(config), config.get("per_layer_config") or {}
    special = {int(index): fields for index, fields in special.items()}
    replaced = (config.get("nbl_config") or {}).get("layers", {})
    shared = count - (config.get("num_kv_shared_layers") or 0)
    without = {*map(int, replaced), *range(shared, count)}
    layers = [
        _layer({**config, **special.get(index, {})}, kinds[index], bits)
        for index in range(count)
    ]
    return tuple(None if i in without else each for i, each in enumerate(layers)), bits


def _element_bits(config: Mapping[str, Any]) -> int:
    quantization = config.get("quantization_config") or {}
    scheme = quantization.get("kv_cache_scheme") or {}
    if isinstance(scheme.get("num_bits"), int):
        bits: int = scheme["num_bits"]
        return bits
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in _BYTES:
        raise ValueError(
            f"config.json: dtype is {dtype!r}, of which the size is not known here "
            f"(known: {', '.join(_BYTES)})."
        )
    return int(8 * _BYTES[dtype])


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """Return the name of each layer's kind."""
    count: int = config["num_hidden_layers"]
    kinds: list[str] | None = config.get("layer_types")
    if kinds is None:
        slides = config.get("sliding_window")
        return ["sliding_attention" if slides else "full_attention"] * count
    if len(kinds) != count:
        if len(set(kinds)) == 1:
            return kinds[:1] * count
        raise ValueError(
            f"config.json: layer_types has {len(kinds)} of {count} layers, so it is "
            "not known which were sliding."
        )
    unknown = set(kinds) - {*RECURRENT, *_ATTENTION}
    if unknown:
        raise ValueError(
            f"config.json: layer_types has {', '.join(sorted(unknown))}, whose size is "
            f"not known here (known: {', '.join(_ATTENTION + RECURRENT)})."
        )
    return kinds


def _layer(config: Mapping[str, Any], kind: str, bits: int) -> LayerCache:
    """Return what a layer of a kind keeps; ``config`` is as it is for this layer."""
    if kind in RECURRENT:
        return LayerCache(0.0, None, *_state(config, bits))
    if config.get("kv_lora_rank"):  # one latent vector, and a key of positions
        width = config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)
        return LayerCache(width * bits / 8)
    slides = (
        kind == "sliding_attention" and config.get("use_sliding_window") is not False
    )
    window: int | None = (config.get("sliding_window") or None) if slides else None
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if kind == "full_attention":  # Gemma 4's, as published
        kv_heads = config.get("num_global_key_value_heads") or kv_heads
        head_dim = config.get("global_head_dim") or head_dim
    return LayerCache(2 * kv_heads * head_dim * bits / 8, window)


def _state(config: Mapping[str, Any], bits: int) -> tuple[float, int]:
    """
    Return the bytes of a recurrent layer's state, and how many cached prefixes take.

    It is what its convolution remembers, and its matrix.

    :raises ValueError: if it is neither a gated delta net nor a Mamba 2
    """
    try:
        if "linear_num_value_heads" in config:
            heads = config["linear_num_value_heads"]
            key, value = (config[f"linear_{of}_head_dim"] for of in ("key", "value"))
            channels = 2 * config["linear_num_key_heads"] * key + heads * value
            taps, matrix = config["linear_conv_kernel_dim"], heads * key * value * 4.0
        else:
            heads, state = config["mamba_n_heads"], config["mamba_d_state"]
            inner = heads * config["mamba_d_head"]
            channels = inner + 2 * config["mamba_n_groups"] * state
            taps, matrix = config["mamba_d_conv"], inner * state * bits / 8
    except KeyError as err:
        raise ValueError(
            f"config.json: no {err.args[0]}, so the size of a recurrent layer's state "
            "is not known here."
        ) from None
    # vLLM can go back to where the prompt of a Mamba 2 ended, which is one state more
    num_states = 2 if "linear_num_value_heads" in config else 3
    return (taps - 1) * channels * bits / 8 + matrix, num_states
