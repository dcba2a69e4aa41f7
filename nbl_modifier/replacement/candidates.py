"""What can be refused before calibration starts: models, layers, calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from compressed_tensors.utils import match_named_modules
from loguru import logger
from torch import nn
from transformers import PreTrainedModel

from nbl_modifier.architectures import Architecture, architecture_of
from nbl_modifier.hf.modeling_nbl import (
    DroppedAttention,
    LinearizedAttention,
    LinearizedBlock,
    decoder_layers,
)

__all__ = [
    "candidate_layers",
    "check_input",
    "check_model",
]


def check_model(model: PreTrainedModel) -> Architecture:
    """
    Return the family of a model that can be linearized.

    :param model: a causal language model as transformers loads it, some of its layers
        linearized already or none
    :raises NotImplementedError: if its family is not supported, or it is another model
        of the family: without a head, say, or with that of a classifier
    :raises ValueError: if it is quantized already, or has adapters
    """
    architecture = architecture_of(model.config.model_type)
    adapted = next((n for n, m in model.named_modules() if _is_adapted(m)), None)
    if adapted is not None:
        raise ValueError(
            f"{adapted}: the model has PEFT adapters, which would be saved without the "
            "model, got a "
            f"{type(model).__name__}. Merge them first: `merge_and_unload()` of the "
            "PeftModel, or load the model without them."
        )
    if not isinstance(model, getattr(transformers, architecture.causal_lm)):
        raise NotImplementedError(
            f"NBLModifier linearizes {architecture.causal_lm} of transformers, got a "
            f"{type(model).__name__}: what it would save is not that model. Load it "
            f"with {architecture.auto_class}; a head of one's own can be put on the "
            "linearized decoder afterwards, which AutoModel loads."
        )
    quantized = next(
        (n for n, m in model.named_modules() if hasattr(m, "quantization_scheme")), None
    )
    if quantized is not None:
        raise ValueError(
            f"{quantized}: the model is quantized already; linear layers made now "
            "would not be. Start from the unquantized model, with "
            "NBLModifier first in the recipe."
        )
    return architecture


def _is_adapted(module: nn.Module) -> bool:
    # As peft's BaseTunerLayer, which need not be installed.
    return hasattr(module, "base_layer") and hasattr(module, "active_adapter")


def check_input(architecture: Architecture, value: str) -> None:
    """
    Refuse an input that the linear layers of a family cannot read.

    :param architecture: the family
    :param value: ``residual`` or ``normalized``
    :raises ValueError: naming the input that they can read
    """
    if value in architecture.inputs:
        return
    (possible,) = architecture.inputs
    reason = (
        "has no norm in front of attention"
        if architecture.input_norm is None
        else f"reads {architecture.input_norm} in its MLP, too, so the norm cannot be "
        "folded into a linear layer"
    )
    raise ValueError(
        f"NBLModifier.input: {architecture.causal_lm} {reason}, got {value!r}. Use "
        f"input: {possible}."
    )


def candidate_layers(
    model: PreTrainedModel,
    architecture: Architecture,
    targets: Sequence[str] | None,
    ignore: Sequence[str],
    kind: str = "attention",
) -> dict[int, str]:
    """
    Return the modules that may be replaced, names by decoder layer index.

    Those that were replaced in an earlier run are not among them.

    :param model: the causal language model
    :param architecture: its family
    :param targets: names, ``re:`` patterns or class names; None: all of the decoder
    :param ignore: the same, to leave out
    :param kind: ``attention`` modules, or decoder layers (``block``)
    :raises ValueError: if a target matches no such module of the decoder, or there is
        none left
    """
    what = "attention module" if kind == "attention" else "decoder layer"
    name_of = (
        architecture.attention_name if kind == "attention" else architecture.layer_name
    )
    names = {
        index: name_of(index)
        for index, layer in enumerate(decoder_layers(model, architecture))
        if not _is_replaced(layer, architecture)
    }
    if not names:
        raise ValueError(
            "NBLModifier: the model has no attention left, every layer is linearized "
            "already. Remove NBLModifier from the recipe."
        )

    def matching(pattern: str) -> set[str]:
        found = {name for name, _ in match_named_modules(model, [pattern], [])}
        return found & set(names.values())

    allowed = set(names.values())
    if targets is not None:
        nothing = [target for target in targets if not matching(target)]
        if nothing or not targets:
            raise ValueError(
                f"NBLModifier.targets: {nothing} matches no {what}. What can "
                f"be matched: {', '.join(names.values())}."
            )
        allowed = set().union(*map(matching, targets))
    for pattern in ignore:
        if not matching(pattern):
            logger.warning("NBLModifier.ignore: {!r} matches no {}", pattern, what)
        allowed -= matching(pattern)
    if not allowed:
        raise ValueError(
            f"NBLModifier.ignore: {list(ignore)} leaves no {what} to replace. Ignore "
            "fewer."
        )
    return {index: name for index, name in names.items() if name in allowed}


def _is_replaced(layer: nn.Module, architecture: Architecture) -> bool:
    return isinstance(layer, LinearizedBlock) or isinstance(
        layer.get_submodule(architecture.attention),
        (LinearizedAttention, DroppedAttention),
    )
