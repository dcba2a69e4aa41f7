"""
Rewrites the mappings of AWQ and SmoothQuant for a model with linearized layers.

A mapping says: divide the output of one module (a norm) by per-channel scales and
multiply the weights of its readers (q, k, v) by them. llm-compressor matches it in
every decoder layer, and fails or corrupts the model where q, k and v are gone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.transform.awq import AWQMapping
from llmcompressor.modifiers.transform.smoothquant.utils import LayerMap
from torch import nn
from torch.utils._pytree import tree_leaves

from .architectures import Architecture

__all__ = ["MixedModel", "refuse_class_names", "rewrite_awq", "rewrite_smoothquant"]


@dataclass(frozen=True)
class MixedModel:
    """
    A model in which some attention layers are linear.

    :param model: the causal language model, layers replaced
    :param architecture: its family
    :param layers: indices of the linearized layers, at least one
    :param normalized: whether the linear layers read the output of the input norm; if
        not there is no norm in front of them that could be smoothed
    """

    model: nn.Module
    architecture: Architecture
    layers: Collection[int]
    normalized: bool

    @property
    def _prefix(self) -> str:
        indices = "|".join(map(str, sorted(self.layers)))
        return rf"{re.escape(self.architecture.layers)}\.(?:{indices})\."

    @property
    def linear(self) -> str:
        """Pattern of the linear layers that replaced attention."""
        return rf"re:{self._prefix}{re.escape(self.architecture.attention)}\.linear$"

    def matches(self, target: str) -> bool:
        """Whether a module with weights, in a linearized layer or not, matches."""
        return any(
            next(module.parameters(), None) is not None
            for _, module in match_named_modules(self.model, [target], [])
        )

    def kept(self, target: str) -> str:
        """Return ``target`` restricted to what is outside the linearized layers."""
        return f"re:(?!{self._prefix}){_as_regex(target)}"

    def linearized(self, target: str) -> str:
        """Return ``target`` restricted to the linearized layers."""
        return f"re:(?={self._prefix}){_as_regex(target)}"

    def split(self, smooth: str, balance: Sequence[str]) -> list[tuple[str, list[str]]]:
        """
        Return the mapping as one or two that hold on the mixed model.

        Kept layers are smoothed as before. In a linearized layer the readers are those
        that still exist and, behind the input norm, the new linear layer.

        :param smooth: pattern of the module to smooth
        :param balance: patterns of its readers
        """
        kept = (self.kept(smooth), [self.kept(target) for target in balance])
        inside = self.linearized(smooth)
        readers = [
            self.linearized(target)
            for target in balance
            if self.matches(self.linearized(target))
        ]
        if self._is_input_norm(inside):
            readers.append(self.linear)
        elif len(readers) == len(balance):
            return [(smooth, list(balance))]  # an MLP's: the same in every layer
        if not readers or not self.matches(inside):
            return [kept]
        return [kept, (inside, readers)]

    def _is_input_norm(self, pattern: str) -> bool:
        norm = "." + self.architecture.input_norm
        return self.normalized and any(
            name.endswith(norm)
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


def rewrite_awq(mappings: Sequence[AWQMapping], mixed: MixedModel) -> list[AWQMapping]:
    """
    Return AWQ mappings that hold on the mixed model.

    :param mappings: the user's, or those llm-compressor infers for the base model
    :param mixed: the model
    """
    return [
        replace(mapping, smooth_layer=smooth, balance_layers=balance)
        for mapping in mappings
        for smooth, balance in mixed.split(mapping.smooth_layer, mapping.balance_layers)
    ]


def rewrite_smoothquant(
    mappings: Sequence[tuple | list], mixed: MixedModel
) -> list[LayerMap]:
    """
    Return SmoothQuant mappings that hold on the mixed model.

    :param mappings: ``(balance_layers, smooth_layer)`` each, the user's or inferred
    :param mixed: the model
    """
    return [
        LayerMap(balance_layers=balance, smooth_layers=smooth)
        for *readers, norm in map(tree_leaves, mappings)
        for smooth, balance in mixed.split(norm, readers)
    ]
