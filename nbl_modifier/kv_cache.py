# SPDX-License-Identifier: Apache-2.0
"""
Size of the KV cache from a model's ``config.json``, as vLLM allots it.

Standard library only.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RECURRENT", "Engine", "KVCache", "LayerCache", "format_bytes"]

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
#: Kinds of layers that keep one state per sequence, whatever its length.
RECURRENT = ("linear_attention", "mamba", "mamba2")
_ATTENTION = ("full_attention", "sliding_attention", "attention", "chunked_attention")


@dataclass(frozen=True)
class Engine:
    """
    What of an engine decides how much memory a sequence gets.

    :param block_size: tokens per block of the KV cache; vLLM's on GPUs, 128 on CPUs
    :param in_flight: tokens that may be scheduled at a time, for which a sliding-window
        layer keeps room besides its window: ``max_num_batched_tokens``, times the
        batches in flight. The default is that of a server on a large GPU
    :param prefix_caching: whether it keeps beginnings of sequences for others to begin
        with, for which a recurrent layer needs more than one state
    """

    block_size: int = 16
    in_flight: int = 8192
    prefix_caching: bool = True


@dataclass(frozen=True)
class LayerCache:
    """
    What one decoder layer keeps of a sequence. Equal ones are of one kind.

    :param bytes_per_token: keys and values of one token, 0 of a recurrent layer
    :param window: tokens that it keeps at most, None: all
    :param state: bytes of a recurrent layer's state, whatever the length
    :param num_states: how many of them it keeps where prefixes are cached
    """

    bytes_per_token: float
    window: int | None = None
    state: float = 0.0
    num_states: int = 1

    @property
    def description(self) -> str:
        """The kind in words."""
        if self.state:
            return "recurrent"
        return "full attention" if self.window is None else "sliding-window attention"

    def size(self, length: int) -> float:
        """
        Return bytes for a sequence, nothing rounded up.

        :param length: its tokens
        """
        kept = length if self.window is None else min(length, self.window)
        return self.state + kept * self.bytes_per_token

    def blocks(self, length: int, block_size: int, engine: Engine) -> int:
        """
        Return how many blocks a sequence takes of vLLM's pool.

        :param length: its tokens
        :param block_size: tokens of this layer in a block
        :param engine: what else decides
        """
        if self.state:
            return self.num_states if engine.prefix_caching else 1
        if self.window is None:
            return math.ceil(length / block_size)
        kept = min(self.window - 1 + engine.in_flight, length)
        return math.ceil(kept / block_size) + 1  # a window begins inside of a block


@dataclass(frozen=True)
class KVCache:
    """
    What each decoder layer keeps.

    :param layers: per decoder layer, in order; None without a cache
    :param element_bits: per cached number
    """

    layers: tuple[LayerCache | None, ...]
    element_bits: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KVCache:
        """
        Return the cache of the checkpoint that ``config`` describes.

        Linearized layers (``nbl_config``) have none, nor have those that read the keys
        and values of an earlier layer. A quantized KV cache (``kv_cache_scheme``) is
        stored in that many bits.

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
        layers = [
            _layer({**config, **special.get(index, {})}, kinds[index], bits)
            for index in range(count)
        ]
        replaced = (config.get("nbl_config") or {}).get("layers", {})
        shared = count - (config.get("num_kv_shared_layers") or 0)
        without = {*map(int, replaced), *range(shared, count)}
        return cls(tuple(layers), bits).without(without)

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
        """Whether all layers that have a cache keep every token, and equally much."""
        kinds = set(self.layers) - {None}
        return len(kinds) <= 1 and all(kind.window is None for kind in kinds if kind)

    def without(self, layers: Collection[int]) -> KVCache:
        """
        Return the cache if ``layers`` had none.

        :param layers: decoder layers, from 0
        """
        left = (None if i in layers else kind for i, kind in enumerate(self.layers))
        return KVCache(tuple(left), self.element_bits)

    def size(self, length: int, batch: int = 1) -> float:
        """
        Return the bytes of keys and values; a sliding layer keeps at most its window.

        ``2 * batch * kv_heads * head_dim * element_bytes * sum_i min(length, w_i)``
        where all heads are alike. What an engine sets aside for them is
        :meth:`allotted`.

        :param length: tokens per sequence
        :param batch: sequences
        """
        return batch * sum(kind.size(length) for kind in self.layers if kind)

    def plan(self, length: int, engine: Engine = Engine()) -> tuple[float, int]:
        """
        Return the bytes of a block of vLLM's pool, and how many a sequence takes.

        vLLM (0.30 to 0.33) keeps all layers in one pool of equal blocks. Layers of one
        kind share a group; of several kinds, each is cut into groups of as many layers
        as the rarest kind has, or, where the most frequent has less than 1.5 times as
        many, as that has. A block holds so many tokens of a group, whether it is full
        or not. So a layer less changes nothing until a group less is needed, or groups
        become smaller.

        :param length: tokens of the sequence
        :param engine: what else decides
        """
        counts = Counter(kind for kind in self.layers if kind)
        if not counts:
            return 0.0, 0
        block_size = self._block_size(engine.block_size)
        page = max(kind.state or block_size * kind.bytes_per_token for kind in counts)

        def blocks(kind: LayerCache, tokens: int) -> int:
            return kind.blocks(length, tokens, engine)

        if len({(kind.window, kind.state) for kind in counts}) == 1:
            tokens = sum(n * kind.bytes_per_token for kind, n in counts.items())
            states = sum(n * kind.state for kind, n in counts.items())
            kind = next(iter(counts))
            return states or block_size * tokens, blocks(kind, block_size)
        fewest, most = min(counts.values()), max(counts.values())
        group = most if most < 1.5 * fewest else fewest
        total = 0
        for kind, count in counts.items():
            # Smaller keys and values: more tokens in a block, where that fills it.
            times = page / (block_size * kind.bytes_per_token or page)
            tokens = block_size * (int(times) if times == int(times) else 1)
            total += math.ceil(count / group) * blocks(kind, tokens)
        return group * page, total

    def _block_size(self, block_size: int) -> int:
        """Return tokens per block, which has to have room for a recurrent state."""
        kinds = [kind for kind in self.layers if kind]
        state = max((kind.state for kind in kinds), default=0.0)
        per_token = max((kind.bytes_per_token for kind in kinds), default=0.0)
        if not state or not per_token:
            return block_size
        return block_size * max(1, math.ceil(state / (block_size * per_token)))

    def allotted(self, length: int, engine: Engine = Engine()) -> float:
        """
        Return the bytes that vLLM sets aside for a sequence, see :meth:`plan`.

        :param length: tokens of the sequence
        :param engine: what else decides
        """
        bytes_per_block, blocks = self.plan(length, engine)
        return bytes_per_block * blocks

    def capacity(self, memory: float, length: int, engine: Engine = Engine()) -> int:
        """
        Return the tokens in so many sequences as fit: vLLM's "KV cache size".

        :param memory: bytes for the KV cache
        :param length: tokens per sequence, vLLM's ``max_model_len``
        :param engine: what else decides
        """
        bytes_per_block, blocks = self.plan(length, engine)
        return int(memory // bytes_per_block / blocks * length)

    def fewest(
        self, layers: Collection[int], limit: float, length: int
    ) -> dict[LayerCache, int] | None:
        """
        Return how many layers of each kind to replace to stay within a limit.

        Of all ways with the fewest layers the one that leaves least.

        :param layers: decoder layers to choose from; recurrent ones do not count, since
            it is not their attention that is replaced
        :param limit: bytes that vLLM may set aside for a sequence
        :param length: tokens of the sequence
        :return: layers by kind; None if all of them are not enough
        """
        found = [(i, self.layers[i]) for i in layers]
        by_kind: dict[LayerCache, list[int]] = {}
        for index, kind in found:
            if kind is not None and not kind.state:
                by_kind.setdefault(kind, []).append(index)
        ways = itertools.product(*(range(len(of) + 1) for of in by_kind.values()))
        best: tuple[int, float, tuple[int, ...]] | None = None
        for way in ways:
            if not any(way) or (best is not None and sum(way) > best[0]):
                continue
            gone = itertools.chain.from_iterable(
                of[:count] for of, count in zip(by_kind.values(), way, strict=True)
            )
            left = self.without(set(gone)).allotted(length)
            # 0.1 * 30 is 3.0000000000000004 in binary; it asks for 3 layers.
            if left <= limit * (1 + 1e-9):
                candidate = (sum(way), left, way)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else dict(zip(by_kind, best[2], strict=True))


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
