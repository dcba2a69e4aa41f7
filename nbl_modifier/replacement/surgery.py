"""
Replaces attention, or whole blocks, of a live model, wherever its weights are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from compressed_tensors.offload import (
    OffloadCache,
    disable_onloading,
    get_cache_init_kwargs,
    get_execution_device,
    get_offloaded_device,
    offload_module,
)
from compressed_tensors.offload.cache import DiskCache
from torch import Tensor, nn

from nbl_modifier.architectures import Architecture
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import LowRankLinear, linearize_layer

__all__ = [
    "Replacement",
    "copied_bytes",
    "drop_restored_norms",
    "execution_device",
    "on_disk",
    "replace",
    "replaced",
    "weight_dtype",
]


@dataclass(frozen=True)
class Replacement:
    """
    What takes the place of a part of one decoder layer: the candidate of a selection.

    :param spec: what is replaced, by what, and what that reads
    :param weight: ``[hidden_size, hidden_size]``, in the dtype of the model, any
        device; ``[hidden_size, rank]`` if the map is of low rank; None if nothing is
        put in place
    :param bias: ``[hidden_size]``, in that dtype, any device; None if nothing is put in
        place
    :param reduce: the factor applied first, ``[rank, hidden_size]``; None: full rank
    """

    spec: LinearizedLayer
    weight: Tensor | None = None
    bias: Tensor | None = None
    reduce: Tensor | None = None

    def modules(self, device: torch.device) -> nn.Linear | LowRankLinear | None:
        """Return the map as it goes into a model, on ``device``; None for a drop."""
        if self.weight is None:
            return None
        linear = _linear(self.weight, self.bias, device)
        if self.reduce is None:
            return linear
        return LowRankLinear(_linear(self.reduce, None, device), linear)


def _linear(weight: Tensor, bias: Tensor | None, device: torch.device) -> nn.Linear:
    d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device), requires_grad=False)
    return linear


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that ``module`` computes on, wherever its weights are kept."""
    device: torch.device = get_execution_device(module)
    return device


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
        _replace_layer(layers, architecture, index, replacement)


@contextmanager
def replaced(
    layers: nn.ModuleList,
    architecture: Architecture,
    replacements: Mapping[int, Replacement],
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """
    Try replacements: put them in, and on exit the very modules that were there before.

    Whatever :func:`replace` exchanges, in the list of layers or inside a layer, is
    undone. May be nested.

    :param layers: the decoder layers
    :param architecture: names of the modules inside them
    :param replacements: by decoder layer index
    :return: a context that undoes it for as long as it lasts
    """
    before = _layers_as_they_are(layers, replacements)
    kept = {module for i in replacements for module in layers[i].modules()}

    @contextmanager
    def undone() -> Iterator[None]:
        after = _layers_as_they_are(layers, replacements)
        _put(layers, before)
        try:
            yield
        finally:
            _put(layers, after)

    try:
        replace(layers, architecture, replacements)
        yield undone
    finally:
        for index in before:
            _discard(module for module in layers[index].modules() if module not in kept)
        _put(layers, before)


def _layers_as_they_are(
    layers: nn.ModuleList, indices: Iterable[int]
) -> dict[int, tuple[nn.Module, dict[str, nn.Module | None]]]:
    """Return layers, and what :func:`replace` may exchange inside them, by index."""
    return {index: (layers[index], dict(layers[index]._modules)) for index in indices}


def _put(
    layers: nn.ModuleList,
    states: Mapping[int, tuple[nn.Module, dict[str, nn.Module | None]]],
) -> None:
    for index, (layer, modules) in states.items():
        layers[index] = layer
        layer._modules.clear()  # first, or modules would change their order
        layer._modules.update(modules)


def copied_bytes(model: nn.Module) -> int:
    """
    Return the bytes of the weights that are copied whenever they are used.

    Those that llm-compressor keeps elsewhere than where they compute: on disk, or on
    the CPU for a GPU.

    :param model: any model
    """
    with disable_onloading():
        return sum(
            weight.nbytes
            for module in model.modules()
            if isinstance(cache := module._parameters, OffloadCache)
            and str(cache.offload_device) != str(cache.onload_device)
            for weight in cache.values()
            if weight is not None
        )


def on_disk(model: nn.Module) -> bool:
    """Return whether llm-compressor keeps some of a model's weights on disk."""
    return any(isinstance(each._parameters, DiskCache) for each in model.modules())


def _discard(modules: Iterable[nn.Module]) -> None:
    """Remove the weights of ``modules``, from disk too if they are offloaded there."""
    for module in modules:
        # Not a missing bias: there is nothing of it on disk that could be removed.
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            del module._parameters[name]


def _replace_layer(
    layers: nn.ModuleList,
    architecture: Architecture,
    index: int,
    replacement: Replacement,
) -> None:
    layer, spec = layers[index], replacement.spec
    old = layer
    if spec.kind == "attention":
        old = layer.get_submodule(architecture.attention)
    # The first submodule with weights: where they are kept, and how they are loaded
    # for execution (CPU, GPU or disk). Dropped attention has none of its own.
    kept = next(
        module
        for module in chain(old.modules(), layer.modules())
        if next(module.parameters(recurse=False), None) is not None
    )
    offloaded = isinstance(kept._parameters, OffloadCache)
    device = get_offloaded_device(kept)
    if device == "disk":
        device = torch.device("cpu")  # offload_module() below writes it to disk
    linear = replacement.modules(device)
    new = linearize_layer(layers, architecture, index, spec, linear)
    changed = [new]
    if spec.kind == "block":
        # Where llm-compressor can put back norms by name, see drop_restored_norms().
        new.add_module(architecture.attention, nn.Module())
    else:
        changed += map(layer.get_submodule, architecture.folded_norms(spec.input))
    for module in changed:
        module.train(old.training)
    if offloaded:
        # Otherwise the next set_onload_device() would pin the weights where they are
        # now, outside of what the run may hold on the device.
        for module in new.modules():
            offload_module(module, **get_cache_init_kwargs(kept))


def drop_restored_norms(
    layer: nn.Module, architecture: Architecture, spec: LinearizedLayer
) -> None:
    """
    Remove norms that llm-compressor put back into a linearized layer, in place.

    For the time of a run it exchanges norms that scale by ``1 + weight`` (Gemma's), and
    at the end restores them by name, those that are gone by then included
    (llmcompressor 0.14.0.1, modeling/offset_norm.py, ``norm_calibration_context``): the
    query and key norms of a removed attention, the norms that were folded into the map,
    which would run again, and all norms of a removed block.

    :param layer: a decoder layer, replaced by :func:`replace`
    :param architecture: names of the modules inside it
    :param spec: what was done to it
    """
    block = spec.kind == "block"
    replaced = layer if block else layer.get_submodule(architecture.attention)
    for name in [name for name, _ in replaced.named_children() if name != "linear"]:
        delattr(replaced, name)
    if block:
        return
    for name in architecture.folded_norms(spec.input):
        norm = layer.get_submodule(name)
        if not isinstance(norm, nn.Identity):
            setattr(layer, name, nn.Identity().train(norm.training))
