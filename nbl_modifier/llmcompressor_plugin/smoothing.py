"""
Rewrites the mappings of AWQ and SmoothQuant for a model with linearized layers.

A mapping says: divide the output of one module (a norm) by per-channel scales and
multiply the weights of its readers (q, k, v) by them. llm-compressor matches it in
every decoder layer, and fails or corrupts the model where q, k and v are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
    AWQ_DYNAMIC_MAPPING_REGISTRY,
)
from llmcompressor.modifiers.transform.awq.mappings import (
    AWQ_MAPPING_REGISTRY,
    default_mappings,
)
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import (
    SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY,
)
from llmcompressor.modifiers.transform.smoothquant.utils import (
    DEFAULT_SMOOTHQUANT_MAPPINGS,
    MAPPINGS_REGISTRY,
    LayerMap,
)
from torch import nn
from torch.utils._pytree import tree_leaves

from nbl_modifier.architectures import ARCHITECTURES, Architecture, architecture_of
from nbl_modifier.hf.configuration_nbl import LinearizedLayer

__all__ = [
    "MixedModel",
    "mappings_of",
    "refuse_class_names",
    "refuse_post_norms",
    "register",
    "rewrite_awq",
    "rewrite_smoothquant",
]


@dataclass(frozen=True)
class MixedModel:
    """
    A model in which some attention layers are linear.

    :param model: the causal language model, layers replaced
    :param architecture: its family
    :param layers: the linearized layers by index. If one reads the ``residual`` stream,
        there is no norm in front of it that could be smoothed
    """

    model: nn.Module
    architecture: Architecture
    layers: Mapping[int, LinearizedLayer]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the view of a model that is a linearized one by its class, too."""
        config: Any = model.config
        architecture = architecture_of(config.model_type)
        return cls(model, architecture, config.linearized_layers())

    def matches(self, target: str) -> bool:
        """Whether a module with weights, in a linearized layer or not, matches."""
        return any(
            next(module.parameters(), None) is not None
            for _, module in match_named_modules(self.model, [target], [])
        )

    def split(self, smooth: str, balance: Sequence[str]) -> list[tuple[str, list[str]]]:
        """
        Return the mapping as the ones that hold on the mixed model.

        Kept layers are smoothed as before. In a layer that was changed the readers are
        those that still exist and, behind the input norm, the new linear layer: its
        first factor if it is of low rank. A replaced block has nothing to smooth.

        :param smooth: pattern of the module to smooth
        :param balance: patterns of its readers
        :raises ValueError: if it is a norm behind attention
        """
        refuse_post_norms("modifier", self.model, self.architecture, [smooth])
        everywhere = self._prefix(self.layers)
        kept, *readers = (
            f"re:(?!{everywhere}){_as_regex(target)}" for target in (smooth, *balance)
        )
        parts = [(kept, readers)]
        for indices, new_reader in self._alike():
            inside, *readers = (
                f"re:(?={self._prefix(indices)}){_as_regex(target)}"
                for target in (smooth, *balance)
            )
            if not self.matches(inside):
                continue
            readers = [target for target in readers if self.matches(target)]
            if new_reader is not None and self._is_input_norm(inside):
                attention = re.escape(self.architecture.attention)
                readers.append(rf"re:{self._prefix(indices)}{attention}\.{new_reader}$")
            if readers:
                parts.append((inside, readers))
        return parts

    def _alike(self) -> list[tuple[list[int], str | None]]:
        """
        Return the changed layers in groups that take the same mappings.

        A mapping is matched layer by layer, and each of its patterns must be found.

        :return: indices, and the pattern of what reads the output of the input norm in
            place of attention
        """
        groups: dict[str | None, list[int]] = {}
        for index, layer in self.layers.items():
            reader = None
            if layer.input == "normalized" and layer.method == "linear":
                reader = "linear" if layer.rank is None else r"linear\.reduce"
            groups.setdefault(reader, []).append(index)
        return [(indices, reader) for reader, indices in groups.items()]

    def _prefix(self, indices: Iterable[int]) -> str:
        """Return a pattern of what the names of the layers' modules begin with."""
        numbers = "|".join(map(str, sorted(indices)))
        return rf"{re.escape(self.architecture.layers)}\.(?:{numbers})\."

    def _is_input_norm(self, pattern: str) -> bool:
        return any(
            name.rpartition(".")[2] == self.architecture.input_norm
            for name, _ in match_named_modules(self.model, [pattern], [])
        )


def _as_regex(target: str) -> str:
    if target.startswith("re:"):
        return target.removeprefix("re:")
    return re.escape(target) + "$"


def refuse_class_names(owner: str, model: nn.Module, targets: Sequence[str]) -> None:
    """
    Refuse mapping targets that are class names, which cannot be limited to layers.

    :param owner: the modifier's class name, for the message
    :param model: the model before it is linearized
    :param targets: patterns and names of a mapping
    :raises ValueError: naming the target
    """
    classes = {type(module).__name__ for module in model.modules()}
    for target in targets:
        if target in classes:
            raise ValueError(
                f"{owner}.mappings: {target!r} is a class name, which would match in "
                "linearized and kept layers alike. Use a pattern of module names, such "
                "as 're:.*input_layernorm$'."
            )


def refuse_post_norms(
    owner: str, model: nn.Module, architecture: Architecture, smooth: Iterable[str]
) -> None:
    """
    Refuse to smooth a norm behind attention, whose output is added to the stream.

    No weights read it that could be multiplied by what it is divided by, so it would
    change the model. llm-compressor's own mappings do so for Gemma, where the norm has
    the name of another family's norm in front of the MLP.

    :param owner: the modifier's class name, for the message
    :param model: the model
    :param architecture: its family
    :param smooth: patterns and names of the modules to be smoothed
    :raises ValueError: naming the pattern
    """
    if architecture.post_norm is None:
        return
    for target in smooth:
        for name, _ in match_named_modules(model, [target], []):
            if name.rpartition(".")[2] == architecture.post_norm:
                raise ValueError(
                    f"{owner}.mappings: {target!r} smooths {name}, which in "
                    f"{architecture.causal_lm} is behind attention: its output is "
                    "added to the residual stream and cannot be divided without "
                    f"changing the model. Pass {owner}(mappings=[...]) without it."
                )


def mappings_of(
    modifier: type[AWQModifier] | type[SmoothQuantModifier], architecture: Architecture
) -> list[Any]:
    """
    Return what llm-compressor smooths in a family, within the text decoder.

    :param modifier: ``AWQModifier`` or ``SmoothQuantModifier``
    :param architecture: the family
    """

    def inside(target: str) -> str:
        # a vision tower has layers and projections of the same names
        return rf"re:(?={re.escape(architecture.layers)}\.){_as_regex(target)}"

    if issubclass(modifier, AWQModifier):
        known = architecture.awq_mappings_of or architecture.causal_lm
        return [
            replace(
                mapping,
                smooth_layer=inside(mapping.smooth_layer),
                balance_layers=[inside(target) for target in mapping.balance_layers],
            )
            for mapping in AWQ_MAPPING_REGISTRY.get(known, default_mappings)
        ]
    return [
        LayerMap(
            balance_layers=[inside(target) for target in mapping.balance_layers],
            smooth_layers=inside(mapping.smooth_layers),
        )
        for mapping in MAPPINGS_REGISTRY.get(
            architecture.causal_lm, DEFAULT_SMOOTHQUANT_MAPPINGS
        )
    ]


def rewrite_awq(
    mappings: Sequence[AWQMapping] | None, mixed: MixedModel
) -> list[AWQMapping]:
    """
    Return AWQ mappings that hold on the mixed model.

    :param mappings: the user's; None: those llm-compressor infers for the base model
    :param mixed: the model
    """
    if mappings is None:
        mappings = mappings_of(AWQModifier, mixed.architecture)
    return [
        replace(mapping, smooth_layer=smooth, balance_layers=balance)
        for mapping in mappings
        for smooth, balance in mixed.split(mapping.smooth_layer, mapping.balance_layers)
    ]


def rewrite_smoothquant(
    mappings: Sequence[tuple | list] | None, mixed: MixedModel
) -> list[LayerMap]:
    """
    Return SmoothQuant mappings that hold on the mixed model.

    :param mappings: ``(balance_layers, smooth_layer)`` each, the user's; None: those
        llm-compressor infers for the base model
    :param mixed: the model
    """
    if mappings is None:
        mappings = mappings_of(SmoothQuantModifier, mixed.architecture)
    return [
        LayerMap(balance_layers=balance, smooth_layers=smooth)
        for *readers, norm in map(tree_leaves, mappings)
        for smooth, balance in mixed.split(norm, readers)
    ]


def register() -> None:
    """
    Tell AWQ and SmoothQuant what to smooth in a linearized checkpoint.

    They infer mappings by the model's class name, and know none of ours.
    """
    for architecture in ARCHITECTURES.values():
        name = architecture.nbl_causal_lm
        AWQ_DYNAMIC_MAPPING_REGISTRY[name] = lambda model: rewrite_awq(
            None, MixedModel.of(model)
        )
        SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY[name] = lambda model: rewrite_smoothquant(
            None, MixedModel.of(model)
        )
