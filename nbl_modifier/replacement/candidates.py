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
        of the family: without a head, with that of a classifier, or one whose layers
        share keys and values
    :raises ValueError: if it is quantized already, or has adapters
    """
    try:
        architecture = architecture_of(model.config.model_type)
    except NotImplementedError as err:
        raise NotImplementedError(f"{err} {_row_to_add(model)}") from None
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
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", None)
    if shared:
        raise NotImplementedError(
            f"{type(model).__name__}: its last {shared} layers read keys and values of "
            "earlier ones (num_kv_shared_layers), which must not lose them. Linearize "
            "a model of the family whose layers all have their own."
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


def _row_to_add(model: PreTrainedModel) -> str:
    """
    Return the row of a family that is not known, as far as names tell.

    Whether what attention adds passes a norm or a factor stands in ``forward`` only, so
    a person has to look: nothing is replaced on a guess.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = (
        (path, module[-1])
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    )
    path, layer = next(found, (None, None))
    if path is None or layer is None:
        return "No list of decoder layers was found in this one."
    children = [name for name, _ in layer.named_children()]
    norms = [
        name for name in children if "norm" in name.lower() or name.startswith("ln")
    ]
    attentions = [
        n for n in children if "attn" in n.lower() or "attention" in n.lower()
    ]
    attention = next((name for name in attentions if name not in norms), None)
    if attention is None:
        return f"No attention was found in its decoder layers: {', '.join(children)}."
    fields = [model.config.model_type, type(model).__name__]
    fields.append(type(model.get_submodule(model.base_model_prefix)).__name__)
    named = {
        "layers": (path, "model.layers"),
        "attention": (attention, "self_attn"),
        "input_norm": (norms[0] if norms else None, "input_layernorm"),
    }
    arguments = [repr(field) for field in fields] + [
        f"{name}={value!r}"
        for name, (value, default) in named.items()
        if value != default
    ]
    return (
        f"By the names in this model it is Architecture({', '.join(arguments)}), if "
        "its layers are built like Llama's; read their forward() for post_norm, "
        f"parallel and output_scale. Norms of a layer: {', '.join(norms) or 'none'}."
    )


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

    Those that were replaced in an earlier run are not among them, nor are layers of
    hybrid models that have no attention.

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
        if _has_attention(layer, architecture)
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


def _has_attention(layer: nn.Module, architecture: Architecture) -> bool:
    """Return whether a layer is neither replaced nor, in a hybrid, recurrent."""
    attention = getattr(layer, architecture.attention, None)
    replaced = LinearizedAttention, DroppedAttention
    return not (
        isinstance(layer, LinearizedBlock)
        or attention is None
        or isinstance(attention, replaced)
    )
