# SPDX-License-Identifier: Apache-2.0
"""Size of the KV cache from a model's ``config.json``. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KVCache", "format_bytes"]

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True)
class KVCache:
    """
    What each decoder layer caches per token.

    :param windows: per decoder layer, in order: 0 without a KV cache, None with one of
        every token, else the sliding window in tokens
    :param bytes_per_token: keys and values of one layer and one token
    :param element_bits: per cached number
    """

    windows: tuple[int | None, ...]
    bytes_per_token: float
    element_bits: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KVCache:
        """
        Return the cache of the checkpoint that ``config`` describes.

        Linearized layers (``nbl_config``) have none. A quantized KV cache
        (``kv_cache_scheme``) is stored in that many bits.

        :param config: content of ``config.json``
        :raises ValueError: if the sizes are not in it
        """
        # that of a vision-language model is nested
        config = {**(config.get("text_config") or {}), **config}
        needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
        missing = [name for name in needed if not isinstance(config.get(name), int)]
        if missing or config.get("kv_lora_rank"):
            what = f"no {', '.join(missing)}" if missing else "a latent KV cache"
            raise ValueError(f"config.json: {what}; its size is not computed here.")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        bits = _element_bits(config)
        windows = _windows(config)
        for index in (config.get("nbl_config") or {}).get("layers", {}):
            windows[int(index)] = 0
        return cls(tuple(windows), 2 * kv_heads * head_dim * bits / 8, bits)

    @classmethod
    def of_base_model(cls, config: Mapping[str, Any], num_layers: int) -> KVCache:
        """
        Return the cache that the model had before it was linearized and quantized.

        :param config: content of the checkpoint's ``config.json``
        :param num_layers: decoder layers before; dropped blocks are not in ``config``
        :raises ValueError: if the sizes are not in it
        """
        changes = {
            "nbl_config": None,
            "quantization_config": None,
            "num_hidden_layers": num_layers,
        }
        return cls.from_config({**config, **changes})

    @property
    def is_uniform(self) -> bool:
        """Whether all layers that have a cache keep every token."""
        return all(window in (0, None) for window in self.windows)

    def without(self, layers: Collection[int]) -> KVCache:
        """
        Return the cache if ``layers`` had none.

        :param layers: decoder layers, from 0
        """
        windows = tuple(
            0 if index in layers else window
            for index, window in enumerate(self.windows)
        )
        return KVCache(windows, self.bytes_per_token, self.element_bits)

    def size(self, length: int, batch: int = 1) -> float:
        """
        Return bytes; a sliding-window layer keeps at most its window.

        ``2 * batch * kv_heads * head_dim * element_bytes * sum_i min(length, w_i)``.
        A serving engine adds the rest of each last block, and may give sliding layers
        as much as others.

        :param length: tokens per sequence
        :param batch: sequences
        """
        tokens = sum(
            length if window is None else min(length, window) for window in self.windows
        )
        return batch * tokens * self.bytes_per_token


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


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return the sliding window of each layer, None for full attention."""
    count: int = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window")
    if config.get("use_sliding_window") is False or not window:
        return [None] * count
    kinds = config.get("layer_types") or ["sliding_attention"] * count
    if len(kinds) != count:
        raise ValueError(
            f"config.json: layer_types has {len(kinds)} of {count} layers, so it is "
            "not known which were sliding."
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def format_bytes(size: float) -> str:
    """
    Return a size with a binary unit and three or four digits.

    :param size: in bytes
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while size >= 1024 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.0f} {units[power]}" if size >= 100 else f"{size:.3g} {units[power]}"
