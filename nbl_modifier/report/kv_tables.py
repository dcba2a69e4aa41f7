# SPDX-License-Identifier: Apache-2.0
"""KV-cache size over context length and batch; arXiv:2505.21077, Table 19."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nbl_modifier.kv_cache import Engine, KVCache, format_bytes

from .blocks import Item, Text
from .collect import Checkpoint, ModelGroup
from .escaping import code
from .table import Table

__all__ = ["kv_cache_section"]

_LENGTHS = tuple(512 * 2**i for i in range(9))  # 512 to 131,072
_BATCHES = (1, 8, 64)
_EIGHTHS = (1, 2, 3, 4)


def kv_cache_section(group: ModelGroup) -> Iterator[Item]:
    """
    Yield the sizes for the base model, each checkpoint, and other numbers of layers.

    :param group: the models
    """
    caches: dict[str, KVCache] = {}
    base, limit = None, None
    for checkpoint in group.checkpoints:
        try:
            config = _config(checkpoint)
            caches[checkpoint.name] = KVCache.from_config(config)
            layers = checkpoint.report.num_hidden_layers
            base = base or KVCache.of_base_model(config, layers)
            limit = limit or config.get("max_position_embeddings")
        except ValueError as err:
            yield Text(f"{code(checkpoint.name)}: {err}", is_absence=True)
    if base is None:
        if not group.checkpoints:
            yield Text("No checkpoint, so no configuration.", is_absence=True)
        return
    columns = {"base": base} | caches | _other_counts(base, caches)
    lengths = [n for n in _LENGTHS if limit is None or n <= limit] or [limit or 0]
    rows = [
        (
            str(batch),
            f"{length:,}",
            *(format_bytes(batch * c.allotted(length)) for c in columns.values()),
        )
        for batch in _BATCHES
        for length in lengths
    ]
    yield Table(("batch", "context", *columns), rows)
    yield Text(
        "What vLLM sets aside for all sequences at full length, from `config.json`. "
        + _explanation(base, caches)
    )


def _config(checkpoint: Checkpoint) -> Mapping[str, object]:
    if checkpoint.config is None:
        raise ValueError("has no config.json beside its report.")
    return checkpoint.config


def _other_counts(base: KVCache, caches: Mapping[str, KVCache]) -> dict[str, KVCache]:
    """Return the cache with 1/8, 2/8 … of the layers replaced, where any will do."""
    if not base.is_uniform:
        return {}
    total = len(base.layers)
    known = {cache.layers.count(None) for cache in caches.values()}
    counts = dict.fromkeys(total * eighths // 8 for eighths in _EIGHTHS)
    return {
        f"m = {count}": base.without(range(count))
        for count in counts
        if count and count not in known
    }


def _explanation(base: KVCache, caches: Mapping[str, KVCache]) -> str:
    if not base.is_uniform:
        return (
            "Layers of several kinds are allotted memory in groups of equally many, "
            "sliding-window layers with room for "
            f"{Engine().in_flight:,} tokens in flight besides their window."
        )
    quantized = [n for n, c in caches.items() if c.element_bits != base.element_bits]
    text = "m layers replaced leave (K − m) / K of it."
    if quantized:
        text += f" {', '.join(quantized)}: with a quantized cache."
    return text
