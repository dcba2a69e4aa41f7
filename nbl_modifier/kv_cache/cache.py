# SPDX-License-Identifier: Apache-2.0
"""The KV cache of a model: what a sequence keeps, and what vLLM sets aside for it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .config import layer_caches
from .layers import Engine, LayerCache

__all__ = ["KVCache", "format_bytes"]

_SERVER = Engine()


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
        return cls(*layer_caches(config))

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

    def plan(self, length: int, engine: Engine = _SERVER) -> tuple[float, int]:
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

    def allotted(self, length: int, engine: Engine = _SERVER) -> float:
        """
        Return the bytes that vLLM sets aside for a sequence, see :meth:`plan`.

        :param length: tokens of the sequence
        :param engine: what else decides
        """
        bytes_per_block, blocks = self.plan(length, engine)
        return bytes_per_block * blocks

    def capacity(self, memory: float, length: int, engine: Engine = _SERVER) -> int:
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
