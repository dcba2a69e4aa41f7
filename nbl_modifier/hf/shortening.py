"""
Models with blocks removed: fewer layers, numbered anew, of the base model's class.

While a run lasts a dropped block is a module that passes the residual stream on, so
that names keep meaning the same layers. Here it goes for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from nbl_modifier.architectures import Architecture

from .configuration_nbl import LinearizedLayer
from .modeling_nbl import LinearizedBlock, decoder_layers

__all__ = [
    "DROPPED_BLOCKS",
    "keep_layer_fields",
    "remove_dropped_blocks",
    "renumbered",
]

#: In ``config.json`` of a shortened model: which blocks of the base model are gone.
#: For readers' information; what loads the model does not look at it.
DROPPED_BLOCKS = "nbl_dropped_blocks"

# What a configuration says about its layers, one by one or by number.
_LAYER_FIELDS = (
    "num_hidden_layers",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "decoder_sparse_step",
    DROPPED_BLOCKS,
)


def renumbered(layers: Mapping[int, LinearizedLayer]) -> dict[int, LinearizedLayer]:
    """
    Return the linearized layers of a model whose dropped blocks are gone.

    :param layers: by index in the model that still has all its blocks
    :return: by index in the shortened model, those that are left
    """
    dropped = [index for index, spec in layers.items() if _is_dropped_block(spec)]
    return {
        index - sum(gone < index for gone in dropped): spec
        for index, spec in layers.items()
        if not _is_dropped_block(spec)
    }


def _is_dropped_block(spec: LinearizedLayer) -> bool:
    return (spec.kind, spec.method) == ("block", "drop")


def keep_layer_fields(config: PretrainedConfig, content: dict[str, Any]) -> None:
    """
    Have a file say about the layers what the configuration says, if they differ.

    :param config: that of the model
    :param content: what is to be written to ``config.json``, changed in place
    """
    text = config.get_text_config()
    for name in config.sub_configs:  # of a vision-language model
        if getattr(config, name) is text:
            content = content[name]
    if content.get("num_hidden_layers") != text.num_hidden_layers:
        for name in _LAYER_FIELDS:
            if getattr(text, name, None) is not None:
                content[name] = getattr(text, name)


def remove_dropped_blocks(model: PreTrainedModel, architecture: Architecture) -> None:
    """
    Delete the blocks that only pass the stream on, in place. Safe to call again.

    :param model: the causal language model
    :param architecture: its family
    """
    layers = decoder_layers(model, architecture)
    kept = [index for index, layer in enumerate(layers) if not _passes_on(layer)]
    if len(kept) == len(layers):
        return
    _shorten_config(model.config.get_text_config(), kept)
    # A slice would make another list than the one that others may hold.
    for index in reversed(range(len(layers))):
        if _passes_on(layers[index]):
            del layers[index]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            # its slot in the KV cache
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]


def _passes_on(layer: nn.Module) -> bool:
    return isinstance(layer, LinearizedBlock) and layer.linear is None


def _shorten_config(config: Any, kept: list[int]) -> None:
    """Leave in ``config`` the layers ``kept``, in place, and number them anew."""
    gone = getattr(config, DROPPED_BLOCKS, [])
    in_base = [
        index
        for index in range(config.num_hidden_layers + len(gone))
        if index not in gone
    ]
    dropped = set(range(len(in_base))).difference(kept)
    setattr(config, DROPPED_BLOCKS, sorted([*gone, *(in_base[i] for i in dropped)]))
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    # Qwen: layers from this one on have a sliding window
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = _count(kept, below=config.max_window_layers)
    # Qwen-MoE: layers with one MLP instead of experts, named or by a period
    if getattr(config, "decoder_sparse_step", None) is not None:
        config.mlp_only_layers = [
            new
            for new, index in enumerate(kept)
            if index in config.mlp_only_layers
            or (index + 1) % config.decoder_sparse_step
        ]
        config.decoder_sparse_step = 1


def _count(indices: Iterable[int], *, below: int) -> int:
    return sum(index < below for index in indices)
