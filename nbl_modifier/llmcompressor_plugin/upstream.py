"""
What llm-compressor 0.14 gets wrong where it hurts NBL, mended from here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from compressed_tensors.modeling.attention import (
    HOOKED_ATTENTION_NAME,
    IMPL_ATTR,
    QuantizedAttentionImpl,
)
from compressed_tensors.utils import patch_attr
from llmcompressor.entrypoints import utils as entrypoints
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from llmcompressor.modeling.moe.gpt_oss import GptOssLinearExperts
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from llmcompressor.pipelines.sequential import pipeline as sequential
from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from llmcompressor.utils import helpers
from torch import nn
from torch.fx.node import Argument
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nbl_modifier.architectures import Architecture

__all__ = [
    "FusedAttention",
    "fuse_experts",
    "hide_bars",
    "keep_causal_mask",
    "keep_expert_names",
    "observe_queries",
    "quantized_attention",
    "release_causal_mask",
    "show_bars",
    "wrap_saving",
]


def keep_causal_mask() -> None:
    """
    Let models traced from now on compute their causal mask. Safe to call again.

    Where a model passes its configuration to the mask function (Mistral, Mixtral, Phi3,
    Qwen3-MoE), the sequential pipeline rebuilds it from ``config.to_dict()``
    (llmcompressor 0.14.0.1, pipelines/sequential/helpers.py,
    ``SequentialTracer.create_arg``). That drops ``_attn_implementation``, without which
    transformers makes no mask (transformers 5.17, masking_utils.py,
    ``create_causal_mask``): every token sees the future, and all that is calibrated is
    calibrated on other activations than the model's.
    """
    SequentialTracer.create_arg = _create_arg  # type: ignore[method-assign]


def release_causal_mask() -> None:
    """Undo :func:`keep_causal_mask`."""
    if SequentialTracer.create_arg is _create_arg:
        SequentialTracer.create_arg = _upstream  # type: ignore[method-assign]


_upstream = SequentialTracer.create_arg


def _create_arg(self: SequentialTracer, a: Any) -> Argument:
    if not isinstance(a, PretrainedConfig):
        return _upstream(self, a)
    fields = {name: self.create_arg(value) for name, value in a.to_dict().items()}
    fields["attn_implementation"] = a._attn_implementation
    return self.create_node("call_function", a.__class__, (), fields)


class FusedAttention:
    """
    Attention in calibration as fast as outside of it.

    llm-compressor forces eager attention on the model (llmcompressor 0.14.0.1,
    utils/helpers.py, ``use_eager_attention``), for the sake of the masks that the model
    makes. It writes out all scores: most of the time of a calibration on long
    sequences. With a mask given, sdpa computes the same.

    :param model: the causal language model, as it was loaded. Modules that were not to
        use sdpa, or limit their scores, which sdpa does not, are left alone
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules: Sequence[Any] = [m for m in model.modules() if _fusible(m)]
        self._configs: list[PretrainedConfig] = []

    def switch_on(self) -> None:
        """Use sdpa from now on, with the masks of the model."""
        self._configs = [module.config for module in self._modules]
        for module in self._modules:
            # A copy, since the model decides by its own, which they share, what masks
            # to make.
            module.config = copy.copy(module.config)
            module.config._attn_implementation = "sdpa"

    def switch_off(self) -> None:
        """Undo :meth:`switch_on`, if it was called."""
        for module, config in zip(self._modules, self._configs, strict=False):
            module.config = config
        self._configs = []


def _fusible(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return (
        hasattr(module, "is_causal")
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "attn_logit_softcapping", None) is None
    )


def _has_quantized_attention(module: nn.Module) -> bool:
    return hasattr(module, IMPL_ATTR)


def observe_queries() -> None:
    """
    Have calibration passes go through quantized attention. Call it once per process.

    compressed-tensors exchanges attention for one that quantizes queries and lets them
    be observed (compressed-tensors 0.19.0, modeling/attention.py). llm-compressor
    forces eager attention on the model while it calibrates, for the sake of the masks
    (llmcompressor 0.14.0.1, utils/helpers.py, ``use_eager_attention``), so nothing is
    observed, and the scales of queries stay what the memory held, NBL or not.
    """
    upstreams = helpers.use_eager_attention

    @contextmanager
    def use_eager_attention(model: nn.Module) -> Iterator[None]:
        hooked: list[Any] = [
            module
            for module in model.modules()
            if _has_quantized_attention(module)
            and getattr(module.config, "_attn_implementation", None)
            == HOOKED_ATTENTION_NAME
        ]
        computes = QuantizedAttentionImpl._original_impl
        if hooked and computes not in ALL_ATTENTION_FUNCTIONS:
            raise ValueError(
                f"the model was loaded with attn_implementation={computes!r}, with "
                "which its attention cannot be quantized: compressed-tensors calls "
                "attention by name, and that one has none. Load it with "
                f"attn_implementation='sdpa', or take {type(hooked[0]).__name__} out "
                "of the quantizer's targets."
            )
        configs = [module.config for module in hooked]
        for module in hooked:
            # A copy: the model decides by its own what masks to make.
            module.config = copy.copy(module.config)
        try:
            with upstreams(model):
                yield
        finally:
            for module, config in zip(hooked, configs, strict=True):
                module.config = config

    helpers.use_eager_attention = use_eager_attention


def quantized_attention(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """
    Let quantizers be initialized again inside of a calibration pass.

    There the model seems to have eager attention, see :func:`observe_queries`. A
    quantizer of attention would take that for the one to call after it has quantized,
    and the model fails later with ``KeyError: 'eager'``.

    :param model: the causal language model
    """
    if not any(_has_quantized_attention(module) for module in model.modules()):
        return nullcontext()
    context: AbstractContextManager[Any] = patch_attr(
        model.config, "_attn_implementation", HOOKED_ATTENTION_NAME
    )
    return context


def keep_expert_names(model: PreTrainedModel, architecture: Architecture) -> None:
    """
    Let the model be saved with the names that its family's checkpoints have.

    llm-compressor splits fused experts into linear layers of its own names, and renames
    them on saving for the families in ``ARCH_TO_2D_MAPPINGS`` (llmcompressor 0.14.0.1,
    modeling/moe/conversion_mappings.py). Mixtral is not among them: what it saves loads
    with random experts in transformers, and not at all in vLLM, NBL or not.

    :param model: the causal language model, about to be saved
    :param architecture: its family
    """
    if not architecture.expert_names or not get_linearized_moes(model):
        return
    conversions = get_checkpoint_conversion_mapping(architecture.model_type)
    renamings = [
        WeightRenaming(rf"\.experts\.(\d+)\.{theirs}\.", rf".experts.\1.{ours}.")
        for ours, theirs in architecture.expert_names
    ]
    # The others fuse experts, which there is nothing to undo of.
    kept = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    set_save_conversion_mapping(model, [*kept, *renamings])


@torch.no_grad()
def fuse_experts(model: PreTrainedModel) -> None:
    """
    Put the experts of gpt-oss back into one weight, unless they are quantized.

    llm-compressor splits them as :func:`keep_expert_names` says. The checkpoints of
    gpt-oss have no other names than those of the fused weights, so nothing would load
    the parts (llmcompressor 0.14.0.1, modeling/moe/gpt_oss.py, has no way back).

    :param model: the causal language model, about to be saved
    """
    for name, experts in get_linearized_moes(model):
        quantized = any(hasattr(m, "quantization_scheme") for m in experts.modules())
        if not isinstance(experts, GptOssLinearExperts) or quantized:
            continue
        like = next(experts.parameters())
        made_of: Any = experts
        fused: Any = made_of._source_experts_cls(made_of._source_config)
        fused.to(device=like.device, dtype=like.dtype)
        for index in range(experts.num_experts):
            parts: Any = experts[index]
            gate, up, down = parts.gate_proj, parts.up_proj, parts.down_proj
            # by turns: even columns are the gate's
            weight = torch.stack([gate.weight, up.weight], dim=1).flatten(0, 1)
            bias = torch.stack([gate.bias, up.bias], dim=1).flatten()
            fused.gate_up_proj[index] = weight.T
            fused.gate_up_proj_bias[index] = bias
            fused.down_proj[index] = down.weight.T
            fused.down_proj_bias[index] = down.bias
        model.set_submodule(name, fused)


def hide_bars() -> None:
    """
    Show none of the sequential pipeline's bars from now on. Safe to call again.

    It has one for each layer (llmcompressor 0.14.0.1, pipelines/sequential/pipeline.py,
    ``_get_batches``), none of which says how far the run is.
    """
    sequential.tqdm = partial(_bar, disable=True)  # type: ignore[misc, assignment]


def show_bars() -> None:
    """Undo :func:`hide_bars`."""
    sequential.tqdm = _bar  # type: ignore[misc]


_bar: Any = sequential.tqdm


def wrap_saving(after: Callable[[PreTrainedModel], None]) -> None:
    """
    Call ``after`` on the model of each ``oneshot()``, once its saving is prepared.

    llm-compressor wraps ``model.save_pretrained`` before the run, and its wrapper ends
    by writing files that have to be part of the checkpoint (llmcompressor 0.14.0.1,
    entrypoints/utils.py, ``pre_process``). Without a modifier of ours in the recipe
    there is no other place that runs in between. Call it once per process.

    :param after: gets the model, ``save_pretrained`` wrapped
    """
    upstreams = entrypoints.modify_save_pretrained

    @wraps(upstreams)
    def modify_save_pretrained(model: PreTrainedModel) -> None:
        upstreams(model)
        after(model)

    entrypoints.modify_save_pretrained = modify_save_pretrained
