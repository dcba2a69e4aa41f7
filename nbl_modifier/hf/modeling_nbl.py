"""
transformers models whose attention is linear in some layers.

No modelling code is copied: each class is the stock one, with the linearized layers
swapped after construction. Imports only torch, transformers and its two siblings, since
this file is also copied beside checkpoints (``trust_remote_code=True``).
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from nbl_modifier.architectures import ARCHITECTURES, Architecture, architecture_of

from .configuration_nbl import LinearizedLayer, config_class

__all__ = [
    "LinearizedAttention",
    "decoder_layers",
    "linearize_attention",
    "model_class",
]


class LinearizedAttention(nn.Module):
    """
    Affine map in place of an attention layer: NBL, arXiv:2505.21077, Eq. for the LMMSE
    estimator ``y = W x + b``.

    :param linear: weight ``[hidden_size, hidden_size]`` and bias ``[hidden_size]``
    :param layer_idx: index of the decoder layer, its slot in the KV cache
    """

    def __init__(self, linear: nn.Linear, layer_idx: int) -> None:
        super().__init__()
        self.linear = linear
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """
        Return the map of every position, and no attention weights.

        :param hidden_states: ``[batch, tokens, hidden_size]``
        :param past_key_values: the KV cache, told how many tokens were seen
        """
        if past_key_values is not None:
            _advance(past_key_values, self.layer_idx, hidden_states)
        return self.linear(hidden_states), None


def _advance(cache: Cache, layer_idx: int, hidden_states: torch.Tensor) -> None:
    """
    Tell the cache that this layer has seen the new tokens.

    transformers reads positions and mask sizes from the length of one layer's cache
    (layer 0, or the first of its kind), so a replaced layer must count too. It stores
    one zero per token for key and for value: a head size of 0 would be free, but
    ``DynamicLayer.get_seq_length`` (transformers 5.17, cache_utils.py) reports length 0
    for an empty tensor. A static cache that was allocated in advance has attention's
    shape in every layer.
    """
    batch, tokens = hidden_states.shape[:2]
    heads = key_size = value_size = 1
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, StaticLayer) and layer.is_initialized:
        heads = layer.num_heads
        key_size, value_size = layer.k_head_dim, layer.v_head_dim
    key = hidden_states.new_zeros(batch, heads, tokens, key_size)
    value = hidden_states.new_zeros(batch, heads, tokens, value_size)
    cache.update(key, value, layer_idx)


def decoder_layers(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """Return the decoder layers of a causal language model or its base model."""
    if isinstance(model, PreTrainedModel) and model.base_model is model:
        # A base model has no outer `model.`: its own attributes start one level down.
        path = architecture.layers.removeprefix(model.base_model_prefix + ".")
    else:
        path = architecture.layers
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def linearize_attention(
    layer: nn.Module,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: nn.Linear,
) -> LinearizedAttention:
    """
    Replace the attention of one decoder layer, in place.

    With ``spec.input == "residual"`` the input norm is replaced by the identity, since
    the map was fitted on the residual stream itself.

    :param layer: the decoder layer
    :param architecture: names of the modules inside it
    :param index: index of the decoder layer
    :param spec: what the linear layer reads
    :param linear: the map, ``[hidden_size, hidden_size]`` with bias
    :return: the new module
    """
    replacement = LinearizedAttention(linear, index)
    setattr(layer, architecture.attention, replacement)
    if spec.input == "residual":
        setattr(layer, architecture.input_norm, nn.Identity())
    return replacement


def _linearize_skeleton(model: PreTrainedModel) -> None:
    """Swap the layers that ``model.config`` names, with weights yet to be loaded."""
    config: Any = model.config
    architecture = architecture_of(config.model_type)
    layers = decoder_layers(model, architecture)
    for index, spec in config.linearized_layers().items():
        linear = nn.Linear(config.hidden_size, config.hidden_size)
        linearize_attention(layers[index], architecture, index, spec, linear)


def _make_model_class(base: type[PreTrainedModel], architecture: Architecture) -> type:
    # The stock signature, whose annotations vLLM and transformers inspect.
    @wraps(base.__init__)
    def initialize(
        self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        base.__init__(self, config, *args, **kwargs)
        _linearize_skeleton(self)

    return type(
        "NBL" + base.__name__,
        (base,),
        {
            "__init__": initialize,
            "__module__": __name__,
            "__doc__": f"``{base.__name__}`` with linearized attention layers.",
            "config_class": config_class(architecture),
        },
    )


_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {}


def model_class(base_name: str, architecture: Architecture) -> type[PreTrainedModel]:
    """
    Return the linearized counterpart of a stock model class.

    :param base_name: name of the stock class, e.g. ``LlamaForCausalLM``
    :param architecture: the family the class belongs to
    """
    if base_name not in _MODEL_CLASSES:
        base = getattr(transformers, base_name)
        _MODEL_CLASSES[base_name] = _make_model_class(base, architecture)
    return _MODEL_CLASSES[base_name]


def __getattr__(name: str) -> type[PreTrainedModel]:
    for architecture in ARCHITECTURES.values():
        if name in (architecture.nbl_causal_lm, architecture.nbl_base_model):
            return model_class(name.removeprefix("NBL"), architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
