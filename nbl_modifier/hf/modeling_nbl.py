"""
transformers models in which some attention layers, or whole blocks, are linear.

No modelling code is copied: each class is the stock one, with the linearized layers
swapped after construction. Imports only torch, transformers and its siblings, since
this file is also copied beside checkpoints (``trust_remote_code=True``).
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from nbl_modifier.architectures import ARCHITECTURES, Architecture, architecture_of

from .cache_nbl import StaticCacheShape, count_tokens
from .configuration_nbl import LinearizedLayer, config_class
from .loading_nbl import CheckpointFiles, layers_path, stock_abilities

__all__ = [
    "DroppedAttention",
    "LinearizedAttention",
    "LinearizedBlock",
    "LowRankLinear",
    "decoder_layers",
    "linearize_attention",
    "linearize_block",
    "linearize_layer",
    "model_class",
]


class LowRankLinear(nn.Module):
    """
    Affine map of low rank, as two linear layers.

    :param reduce: weight ``[rank, d_in]``, no bias
    :param expand: weight ``[d_out, rank]`` and bias ``[d_out]``
    """

    def __init__(self, reduce: nn.Linear, expand: nn.Linear) -> None:
        super().__init__()
        self.reduce = reduce
        self.expand = expand

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Return the map of every position.

        :param hidden_states: ``[..., d_in]``
        :return: ``[..., d_out]``
        """
        output: torch.Tensor = self.expand(self.reduce(hidden_states))
        return output


class LinearizedAttention(nn.Module):
    """
    Affine map in place of an attention layer, ``y = W x + b``: NBL, arXiv:2505.21077.

    :param linear: the map, ``hidden_size`` to ``hidden_size`` with bias
    :param layer_idx: index of the decoder layer, its slot in the KV cache
    """

    def __init__(self, linear: nn.Linear | LowRankLinear, layer_idx: int) -> None:
        super().__init__()
        self.linear = linear
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """
        Return the map of every position, and no attention weights.

        :param hidden_states: ``[batch, tokens, hidden_size]``
        :param kwargs: the KV cache among them is told how many tokens were seen
        """
        count_tokens(kwargs, self.layer_idx, hidden_states)
        return self.linear(hidden_states), None


class DroppedAttention(nn.Module):
    """
    Nothing in place of an attention layer: it adds zero to the residual stream.

    Attention DROP, the baseline of NBL, arXiv:2505.21077, and of LLM-Drop,
    arXiv:2406.15786.

    :param layer_idx: index of the decoder layer, its slot in the KV cache
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """
        Return zero for every position, and no attention weights.

        :param hidden_states: ``[batch, tokens, hidden_size]``
        :param kwargs: the KV cache among them is told how many tokens were seen
        """
        count_tokens(kwargs, self.layer_idx, hidden_states)
        return torch.zeros_like(hidden_states), None


class LinearizedBlock(nn.Module):
    """
    Affine map in place of a whole transformer block: NBL, arXiv:2505.21077, applied to
    blocks.

    The map gives what the block adds to the residual stream, so that the stream itself
    passes unrounded, also where the map is quantized or of low rank. For the LMMSE
    estimator that is the same as mapping the stream to the stream.

    :param linear: the map, ``hidden_size`` to ``hidden_size`` with bias; None for a
        block that adds nothing
    :param layer_idx: index of the decoder layer, its slot in the KV cache
    """

    def __init__(
        self, linear: nn.Linear | LowRankLinear | None, layer_idx: int
    ) -> None:
        # Not super(): that is the stock block, see _block_class(), and would build the
        # attention and MLP that this stands for.
        nn.Module.__init__(self)
        self.linear = linear
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Return the residual stream after the block.

        :param hidden_states: the stream before it, ``[batch, tokens, hidden_size]``
        :param kwargs: the KV cache among them is told how many tokens were seen
        """
        count_tokens(kwargs, self.layer_idx, hidden_states)
        if self.linear is None:
            return hidden_states
        return hidden_states + self.linear(hidden_states)


_BLOCK_CLASSES: dict[type[nn.Module], type[LinearizedBlock]] = {}


def _block_class(stock: type[nn.Module]) -> type[LinearizedBlock]:
    if stock not in _BLOCK_CLASSES:
        # Still one of the model's blocks: what collects hidden states, checkpoints
        # gradients or calibrates layer by layer finds blocks by their class.
        _BLOCK_CLASSES[stock] = type(
            "Linearized" + stock.__name__,
            (LinearizedBlock, stock),
            {"__module__": __name__, "__doc__": LinearizedBlock.__doc__},
        )
    return _BLOCK_CLASSES[stock]


def decoder_layers(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """Return the decoder layers of a causal language model or its base model."""
    layers = model.get_submodule(layers_path(model, architecture))
    assert isinstance(layers, nn.ModuleList)
    return layers


def linearize_attention(
    layer: nn.Module,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: nn.Linear | LowRankLinear | None,
) -> LinearizedAttention | DroppedAttention:
    """
    Replace the attention of one decoder layer, in place.

    The norms that the map was fitted across become identities: the input norm if it
    reads the residual stream, and a norm of attention's output.

    :param layer: the decoder layer
    :param architecture: names of the modules inside it
    :param index: index of the decoder layer
    :param spec: of which ``input`` alone matters here, what the linear layer reads
    :param linear: the map, ``hidden_size`` to ``hidden_size`` with bias; None to drop
        attention
    :return: the new module
    """
    replacement = (
        DroppedAttention(index)
        if linear is None
        else LinearizedAttention(linear, index)
    )
    setattr(layer, architecture.attention, replacement)
    for name in architecture.folded_norms(spec.input):
        setattr(layer, name, nn.Identity())
    return replacement


def linearize_block(
    layers: nn.ModuleList, index: int, linear: nn.Linear | LowRankLinear | None
) -> LinearizedBlock:
    """
    Replace one whole decoder layer, in place.

    :param layers: the decoder layers
    :param index: which one
    :param linear: the map from the residual stream to what is added to it; None to add
        nothing
    :return: the new block, of a class derived from the old one's
    """
    stock = type(layers[index])
    replacement = _block_class(stock)(linear, index)
    layers[index] = replacement
    return replacement


def linearize_layer(
    layers: nn.ModuleList,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: nn.Linear | LowRankLinear | None,
) -> nn.Module:
    """
    Replace the part of one decoder layer that ``spec`` names, in place.

    :param layers: the decoder layers
    :param architecture: names of the modules inside them
    :param index: which one
    :param spec: what is replaced, by what, and what that reads
    :param linear: the map; None where ``spec.method`` is ``drop``
    :return: the new module
    """
    assert (linear is None) == (spec.method == "drop")
    if spec.kind == "block":
        return linearize_block(layers, index, linear)
    return linearize_attention(layers[index], architecture, index, spec, linear)


def _linearize_skeleton(model: PreTrainedModel) -> None:
    """Swap the layers that ``model.config`` names, with weights yet to be loaded."""
    config: Any = model.config
    architecture = architecture_of(config.model_type)
    layers = decoder_layers(model, architecture)
    hidden_size = config.get_text_config().hidden_size
    for index, spec in config.linearized_layers().items():
        linear = _empty_map(hidden_size, spec)
        linearize_layer(layers, architecture, index, spec, linear)


def _empty_map(
    hidden_size: int, spec: LinearizedLayer
) -> nn.Linear | LowRankLinear | None:
    if spec.method == "drop":
        return None
    if spec.rank is None:
        return nn.Linear(hidden_size, hidden_size)
    return LowRankLinear(
        nn.Linear(hidden_size, spec.rank, bias=False),
        nn.Linear(spec.rank, hidden_size),
    )


def _make_model_class(base: type[PreTrainedModel], architecture: Architecture) -> type:
    # The stock signature, whose annotations vLLM and transformers inspect.
    @wraps(base.__init__)
    def initialize(
        self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        base.__init__(self, config, *args, **kwargs)
        _linearize_skeleton(self)

    generates = issubclass(base, GenerationMixin)
    # The mixins stand before the stock class, whose methods they override.
    return type(
        "NBL" + base.__name__,
        (CheckpointFiles, *([StaticCacheShape] if generates else []), base),
        {
            "__init__": initialize,
            **stock_abilities(base),
            "__module__": __name__,
            "__doc__": f"``{base.__name__}`` with linearized layers.",
            "config_class": config_class(architecture),
        },
    )


def _keep_weight_conversion(architecture: Architecture) -> None:
    """
    Have linearized checkpoints read and written as those of the base model.

    Where names or shapes in a checkpoint differ from the model's, such as experts that
    are one weight in memory, transformers converts them by rules that it looks up by
    class and by ``model_type``. Ours have other names, so these are given the same
    rules; without them such weights would stay random.

    :param architecture: the family
    """
    for base, ours in (
        (architecture.model_type, architecture.nbl_model_type),
        (architecture.causal_lm, architecture.nbl_causal_lm),
        (architecture.base_model, architecture.nbl_base_model),
    ):
        conversion = get_checkpoint_conversion_mapping(base)
        if conversion is not None:
            register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)


_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {}


def model_class(base_name: str, architecture: Architecture) -> type[PreTrainedModel]:
    """
    Return the linearized counterpart of a stock model class.

    :param base_name: name of the stock class, e.g. ``LlamaForCausalLM``
    :param architecture: the family the class belongs to
    """
    if base_name not in _MODEL_CLASSES:
        base = getattr(transformers, base_name)
        _keep_weight_conversion(architecture)
        _MODEL_CLASSES[base_name] = _make_model_class(base, architecture)
    return _MODEL_CLASSES[base_name]


def __getattr__(name: str) -> type[PreTrainedModel]:
    for architecture in ARCHITECTURES.values():
        if name in (architecture.nbl_causal_lm, architecture.nbl_base_model):
            return model_class(name.removeprefix("NBL"), architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
