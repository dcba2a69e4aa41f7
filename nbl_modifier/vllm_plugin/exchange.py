"""The exchange of attention for linear layers in a model that vLLM is building."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from nbl_modifier.architectures import Architecture
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import linearize_layer

from .layers import DroppedAttention, LinearizedAttention, LinearizedBlock, ResidualAdd

__all__ = [
    "LeftOut",
    "forget",
    "left_out",
    "let_go_of_experts",
    "replace_in_transformers",
    "replace_layer",
    "stock_class",
]

# Below "vllm", the only logger that vLLM gives a handler.
logger = init_logger(f"vllm.{__name__}")


class LeftOut(nn.Module):
    """
    Keeps the place of an attention layer until what replaces it is there.

    Some of vLLM's models set something in attention once all layers are there (Ernie
    4.5 its rotary embedding); here it is lost.
    """

    def __getattr__(self, name: str) -> Any:
        """
        Return something to set attributes of.

        :param name: of a part of attention
        """
        if name.startswith("_"):
            raise AttributeError(name)
        return SimpleNamespace()


@contextlib.contextmanager
def left_out(
    attribute: str, names: Set[str], vllm_config: VllmConfig
) -> Iterator[None]:
    """
    Take attention modules out at the moment they become part of their decoder layer.

    vLLM's classes have no common way to leave attention out, but all of them assign it
    to an attribute of the layer, and torch lets a hook change what is assigned.

    :param attribute: name of attention in a decoder layer
    :param names: full names of the attention modules to take out
    :param vllm_config: knows the attention layers built so far by their full names
    """

    context = vllm_config.compilation_config.static_forward_context

    def exchange(_: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        if name != attribute or module is None:
            return None
        # What has the KV cache may have the same name inside of attention (gpt-oss).
        if any(module is each for each in context.values()):
            return None
        # "model.layers.3.self_attn.attn" is inside of "model.layers.3.self_attn"
        entries = _entries(module, vllm_config)
        if names.isdisjoint(entry.rpartition(".")[0] for entry in entries):
            return None
        forget(module, vllm_config)
        return LeftOut()

    # Annotated as if it returned nothing; documented to return a module in its place.
    handle = register_module_module_registration_hook(exchange)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def replace_layer(
    layers: nn.ModuleList,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: nn.Module | None,
    vllm_config: VllmConfig,
) -> None:
    """
    Swap the part of one layer that ``spec`` names, and have vLLM forget the old.

    :param layers: of the model; the entry changes
    :param architecture: the family's row
    :param index: of the layer, from 0
    :param spec: what the checkpoint says of it
    :param linear: the map, None where attention was dropped
    :param vllm_config: has vLLM's lists of layers
    """
    layer = layers[index]
    attention = getattr(layer, architecture.attention)
    if not isinstance(attention, LeftOut):
        # Named otherwise than expected: the same in the end, for more memory until now.
        logger.warning_once("layer %d was built with attention, then replaced", index)
        forget(attention, vllm_config)
    if spec.kind == "block":
        assert linear is not None  # a dropped block is in no checkpoint
        if _entries(layer, vllm_config):  # experts
            forget(layer, vllm_config)
        layers[index] = LinearizedBlock(linear, architecture.vllm_stream)
        return
    summands = get_tensor_model_parallel_world_size() if architecture.parallel else 1
    replacement = (
        DroppedAttention() if linear is None else LinearizedAttention(linear, summands)
    )
    setattr(layer, architecture.attention, replacement)
    for name in architecture.folded_norms(spec.input):
        setattr(layer, name, ResidualAdd())


def replace_in_transformers(
    layers: nn.ModuleList,
    architecture: Architecture,
    index: int,
    spec: LinearizedLayer,
    linear: Any,
    vllm_config: VllmConfig,
) -> None:
    """
    Swap part of a layer in a model whose decoder layers are those of transformers.

    :param layers: of the model; the entry changes
    :param architecture: the family's row
    :param index: of the layer, from 0
    :param spec: what the checkpoint says of it
    :param linear: the map, None where attention was dropped
    :param vllm_config: has vLLM's lists of layers
    """
    old = layers[index]
    if spec.kind == "attention":
        old = old.get_submodule(architecture.attention)
    forget(old, vllm_config)
    linearize_layer(layers, architecture, index, spec, linear)


@contextlib.contextmanager
def stock_class(config: Any) -> Iterator[None]:
    """
    Make a linearized configuration one of the base model's class, for a time.

    transformers chooses the model by the configuration's class, and vLLM has to see
    attention in every layer, or it refuses to build any.

    :param config: a linearized configuration
    """
    ours = type(config)
    config.__class__ = next(c for c in ours.__mro__ if c.__module__ != ours.__module__)
    try:
        yield
    finally:
        config.__class__ = ours


def _entries(module: nn.Module, vllm_config: VllmConfig) -> list[str]:
    """Return vLLM's names of the attention layers and experts inside ``module``."""
    context = vllm_config.compilation_config.static_forward_context
    # By identity, whatever vLLM calls them.
    inside = {id(each) for each in module.modules()}
    return [name for name, each in context.items() if id(each) in inside]


def forget(replaced: nn.Module, vllm_config: VllmConfig) -> None:
    """
    Withdraw what is inside ``replaced`` from vLLM's lists of layers, and free it.

    Of those with a KV cache: without it everything would work, and no memory would be
    freed. Of mixtures of experts, which vLLM counts off one by one in each forward
    pass: with one too many the next one would use the wrong weights.

    :param replaced: the module, which no forward pass calls any more
    :param vllm_config: has the lists
    """
    compilation = vllm_config.compilation_config
    context = compilation.static_forward_context
    names = _entries(replaced, vllm_config)
    assert names, f"{replaced} has no entry in static_forward_context"
    for name in names:
        del context[name]
        if name in compilation.static_all_moe_layers:
            compilation.static_all_moe_layers.remove(name)
    # Parameters know how they are loaded, which refers to their module: without this
    # they would stay until Python looks for cycles. Buffers are shared with layers that
    # are kept.
    for parameter in replaced.parameters():
        parameter.data = parameter.data.new_empty(0)


def let_go_of_experts(model: nn.Module) -> None:
    """
    Drop the experts of replaced blocks from the list that vLLM's models keep beside
    their modules, which would hold their memory.

    :param model: with all replacements in place
    """
    experts: list[nn.Module] | None = getattr(model, "moe_layers", None)
    if experts is not None:
        present = {id(module) for module in model.modules()}
        experts[:] = [module for module in experts if id(module) in present]
