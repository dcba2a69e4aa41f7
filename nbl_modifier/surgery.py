"""
Replaces attention modules of a live model, on whatever device its weights are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from compressed_tensors.offload import (
    OffloadCache,
    get_cache_init_kwargs,
    get_offloaded_device,
    offload_module,
)
from torch import Tensor, nn

from .architectures import Architecture
from .hf.configuration_nbl import LinearizedLayer
from .hf.modeling_nbl import linearize_attention

__all__ = [
    "Replacement",
    "drop_restored_norms",
    "replace",
    "replace_attention",
    "replaced",
    "weight_dtype",
]


@dataclass(frozen=True)
class Replacement:
    """
    What takes the place of a part of one decoder layer: the candidate of a selection.

    :param spec: what is replaced, by what, and what that reads
    :param weight: ``[hidden_size, hidden_size]``, in the dtype of the model, any device
    :param bias: ``[hidden_size]``, likewise
    """

    spec: LinearizedLayer
    weight: Tensor
    bias: Tensor


def weight_dtype(attention: nn.Module) -> torch.dtype:
    """Return the dtype of the first weight of ``attention``, that of the new linear."""
    return next(attention.parameters()).dtype


def replace(
    layers: nn.ModuleList,
    architecture: Architecture,
    replacements: Mapping[int, Replacement],
) -> None:
    """
    Put each replacement where it belongs, in place.

    :param layers: the decoder layers
    :param architecture: names of the modules inside them
    :param replacements: by decoder layer index
    """
    for index, replacement in sorted(replacements.items()):
        replace_attention(
            layers[index],
            architecture,
            index,
            replacement.spec,
            replacement.weight,
            replacement.bias,
        )


@contextmanager
def replaced(
    layers: nn.ModuleList,
    architecture: Architecture,
    replacements: Mapping[int, Replacement],
) -> Iterator[None]:
    """
    Try replacements: put them in, and on exit the very modules that were there before.

    Whatever :func:`replace` exchanges, in the list of layers or inside a layer, is
    undone. May be nested.

    :param layers: the decoder layers
    :param architecture: names of the modules inside them
    :param replacements: by decoder layer index
    """
    before = {i: (layers[i], dict(layers[i]._modules)) for i in replacements}
    kept = {module for i in replacements for module in layers[i].modules()}
    try:
        replace(layers, architecture, replacements)
        yield
    finally:
        for index, (layer, modules) in before.items():
            _discard(module for module in layers[index].modules() if module not in kept)
            layers[index] = layer
            layer._modules.clear()  # first, or modules would change their order
            layer._modules.update(modules)


def _discard(modules: Iterable[nn.Module]) -> None:
    """Remove the weights of ``modules``, from disk too if they are offloaded there."""
    for module in modules:
        for name in list(module._parameters):
            del module._parameters[name]


def replace_attention(
    layer: nn.Module,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    weight: Tensor,
    bias: Tensor,
) -> None:
    """
    Put an ``nn.Linear`` in place of one layer's attention, in place.

    :param layer: the decoder layer
    :param architecture: names of the modules inside it
    :param index: index of the decoder layer
    :param spec: what the linear layer reads
    :param weight: ``[hidden_size, hidden_size]``, any dtype and device
    :param bias: ``[hidden_size]``
    """
    attention = layer.get_submodule(architecture.attention)
    # The first submodule with weights: where they are kept, and how they are loaded
    # for execution (CPU, GPU or disk).
    kept = next(
        module
        for module in attention.modules()
        if next(module.parameters(recurse=False), None) is not None
    )
    offloaded = isinstance(kept._parameters, OffloadCache)
    device = get_offloaded_device(kept)
    if device == "disk":
        device = torch.device("cpu")  # offload_module() below writes it to disk
    d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, device="meta")
    linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(device), requires_grad=False)
    replacement = linearize_attention(layer, architecture, index, spec, linear)
    for module in (replacement, layer.get_submodule(architecture.input_norm)):
        module.train(attention.training)
    if offloaded:
        # Otherwise the next set_onload_device() would pin the weights where they are
        # now, outside of what the run may hold on the device.
        for module in replacement.modules():
            offload_module(module, **get_cache_init_kwargs(kept))


def drop_restored_norms(
    layer: nn.Module, architecture: Architecture, spec: LinearizedLayer
) -> None:
    """
    Remove norms that llm-compressor put back into a linearized layer, in place.

    For the time of a run it exchanges norms that scale by ``1 + weight`` (Gemma's), and
    at the end restores them by name, those that are gone by then included
    (llmcompressor 0.14.0.1, modeling/offset_norm.py, ``norm_calibration_context``): the
    query and key norms of a removed attention, and the input norm that was folded into
    the map, which would run again.

    :param layer: a decoder layer, replaced by :func:`replace_attention`
    :param architecture: names of the modules inside it
    :param spec: what its linear layer reads
    """
    attention = layer.get_submodule(architecture.attention)
    for name in [name for name, _ in attention.named_children() if name != "linear"]:
        delattr(attention, name)
    norm = layer.get_submodule(architecture.input_norm)
    if spec.input == "residual" and not isinstance(norm, nn.Identity):
        setattr(layer, architecture.input_norm, nn.Identity().train(norm.training))
