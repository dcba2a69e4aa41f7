"""
KV caches of transformers under layers that keep no keys and values.

Imports only torch and transformers: copied beside checkpoints, see ``modeling_nbl``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer, StaticLayer

__all__ = ["StaticCacheShape", "count_tokens"]


def count_tokens(
    arguments: dict[str, Any], layer_idx: int, hidden_states: torch.Tensor
) -> None:
    """
    Tell the KV cache, if there is one, that a replaced layer has seen the new tokens.

    transformers reads positions and mask sizes from the length of one layer's cache
    (layer 0, or the first of its kind), so a replaced layer must count too. It stores
    two numbers per token, a key and a value of one head of size 1. Size 0 would be
    free, but ``DynamicLayer.get_seq_length`` (transformers 5.17 to 5.19,
    cache_utils.py) reports length 0 for an empty tensor.

    :param arguments: what the stock layer would be called with; the cache among them,
        by whatever name
    :param layer_idx: index of the decoder layer, its slot in the cache
    :param hidden_states: ``[batch, tokens, hidden_size]``
    """
    for value in arguments.values():
        if isinstance(value, Cache):
            _append(value, layer_idx, hidden_states)


def _append(cache: Cache, layer_idx: int, hidden_states: torch.Tensor) -> None:
    batch, tokens = hidden_states.shape[:2]
    key = value = hidden_states.new_zeros(batch, 1, tokens, 1)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, QuantizedLayer):
        # Nothing to quantize, and groups of numbers larger than there are.
        cache.layers[layer_idx] = DynamicLayer()
    elif isinstance(layer, StaticLayer) and _has_attention_shape(layer):
        if torch.compiler.is_compiling():
            # Memory that a compiled or exported graph already refers to.
            key = key.expand(-1, layer.num_heads, -1, layer.k_head_dim)
            value = value.expand(-1, layer.num_heads, -1, layer.v_head_dim)
        else:
            layer.lazy_initialization(key, value)
    cache.update(key, value, layer_idx)


def _has_attention_shape(layer: StaticLayer) -> bool:
    """Return whether memory was allocated in advance as if this were attention."""
    return layer.is_initialized and (layer.num_heads, layer.k_head_dim) != (1, 1)


class StaticCacheShape:
    """Mixin of the causal language models: what ``generate()`` allocates in advance."""

    config: Any

    def _get_static_cache_init_shape(self) -> tuple[list[int], list[int]] | None:
        """
        Return heads and head size of each layer's static cache, one for replaced ones.

        Overrides ``GenerationMixin``'s (transformers 5.17 to 5.19), whose result goes
        to ``StaticCache.early_initialization``.
        """
        shape = super()._get_static_cache_init_shape()  # type: ignore[misc]
        if shape is None:  # it cannot be known in advance
            return None
        linearized = self.config.linearized_layers()

        def per_layer(size: int | list[int]) -> list[int]:
            num_layers = self.config.get_text_config().num_hidden_layers
            sizes = [size] * num_layers if isinstance(size, int) else size
            return [1 if i in linearized else own for i, own in enumerate(sizes)]

        heads, head_size = shape
        return per_layer(heads), per_layer(head_size)
