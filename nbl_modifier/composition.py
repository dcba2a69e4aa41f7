"""
Makes the later modifiers of a recipe see the linearized model.

llm-compressor initializes every modifier on the original model, before the first one
calibrates; what they resolved there (modules, schemes, mappings) is stale once layers
were replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

__all__ = ["check_order", "refresh"]

# Their on_initialize attaches schemes to, or collects, the modules present then, and
# may be run again.
_RERUN = (QuantizationMixin, SparsityModifierBase)
_UNSUPPORTED = (AWQModifier, SmoothQuantModifier, SpinQuantModifier)


def _name(modifier: Modifier) -> str:
    return type(modifier).__name__


def check_order(earlier: Sequence[Modifier], later: Sequence[Modifier]) -> None:
    """
    Refuse recipes in which the modifiers around NBL cannot work.

    :param earlier: the recipe's modifiers before NBLModifier
    :param later: those after it
    :raises ValueError: if a quantizer comes first
    :raises NotImplementedError: if a later modifier cannot follow NBL
    """
    for modifier in earlier:
        if isinstance(modifier, QuantizationMixin):
            raise ValueError(
                f"{_name(modifier)} comes before NBLModifier in the recipe: the linear "
                "layers that NBL makes would stay unquantized. Put NBLModifier first."
            )
    for modifier in later:
        if isinstance(modifier, _UNSUPPORTED):
            raise NotImplementedError(
                f"{_name(modifier)} after NBLModifier is not supported yet. Use "
                "GPTQModifier or QuantizationModifier."
            )


def refresh(later: Sequence[Modifier], state: State, kwargs: dict[str, Any]) -> None:
    """
    Let the modifiers after NBL resolve their targets on the linearized model.

    :param later: the recipe's modifiers after NBLModifier, initialized
    :param state: the session's state, with the linearized model
    :param kwargs: what ``on_initialize`` was called with
    """
    for modifier in later:
        if isinstance(modifier, _RERUN):
            # Not initialize(), which refuses to run twice.
            modifier.on_initialize(state, **kwargs)
