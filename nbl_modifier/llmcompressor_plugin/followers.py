"""
Makes the later modifiers of a recipe see the linearized model.

llm-compressor initializes every modifier on the original model, before the first one
calibrates; what they resolved there (modules, schemes, mappings) is stale once layers
were replaced. Without this (llmcompressor 0.14.0.1) quantizers leave the new linear
layers unquantized without a word, AWQ fails, and SmoothQuant corrupts the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import is_match
from llmcompressor.core import State, active_session
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import (
    ConstantPruningModifier,
    MagnitudePruningModifier,
)
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from nbl_modifier.architectures import architecture_of
from nbl_modifier.hf.configuration_nbl import NBLConfigMixin

from .options import Options
from .smoothing import (
    MixedModel,
    mappings_of,
    refuse_class_names,
    refuse_post_norms,
    rewrite_awq,
    rewrite_smoothquant,
)
from .upstream import quantized_attention

__all__ = ["Followers", "check_recipe", "refuse_earlier", "refuse_shared_pass"]

_REFUSED: dict[type[Modifier], str] = {
    SpinQuantModifier: (
        "it centers the embeddings, which changes the residual stream that the linear "
        "layers were fitted on (and, under RMSNorm, the model itself)"
    ),
    ConstantPruningModifier: "it keeps masks of modules that NBL replaces",
    MagnitudePruningModifier: "it keeps masks of modules that NBL replaces",
}


# What patterns are matched with before the real one exists.
_A_LINEAR = nn.Linear(1, 1, device="meta")


def _name(modifier: Modifier) -> str:
    return type(modifier).__name__


def refuse_earlier(earlier: Sequence[Modifier]) -> None:
    """
    Refuse recipes in which a quantizer comes before NBL.

    :param earlier: the recipe's modifiers before NBLModifier
    :raises ValueError: naming the modifier
    """
    for modifier in earlier:
        if isinstance(modifier, QuantizationMixin):
            raise ValueError(
                f"{_name(modifier)} comes before NBLModifier in the recipe: the linear "
                "layers that NBL makes would stay unquantized. Put NBLModifier first."
            )


class Followers:
    """
    The modifiers after NBL in a recipe.

    Made in NBL's ``on_initialize``, which runs before theirs, so that ``mappings`` is
    still what the user wrote.

    :param modifiers: in recipe order
    :param model: the model before it is linearized
    :param kwargs: what ``on_initialize`` was called with
    :raises ValueError: if a modifier cannot follow NBL, or a mapping is by class name
    """

    def __init__(
        self,
        modifiers: Sequence[Modifier],
        model: PreTrainedModel,
        kwargs: dict[str, Any],
    ) -> None:
        self._modifiers = list(modifiers)
        self._kwargs = kwargs
        self._user_mappings: dict[int, Any] = {
            id(modifier): modifier.mappings
            for modifier in modifiers
            if isinstance(modifier, (AWQModifier, SmoothQuantModifier))
        }
        for modifier in modifiers:
            for kind, reason in _REFUSED.items():
                if isinstance(modifier, kind):
                    raise ValueError(
                        f"{_name(modifier)} cannot follow NBLModifier: {reason}. "
                        "Remove it from the recipe."
                    )
            mappings = self._user_mappings.get(id(modifier))
            refuse_class_names(_name(modifier), model, _mapping_targets(mappings))
            if isinstance(modifier, (AWQModifier, SmoothQuantModifier)):
                _refuse_post_norms(modifier, model)
            if mappings is not None and isinstance(model.config, NBLConfigMixin):
                # Linearized in an earlier run: stale from the beginning.
                self._rewrite_mappings(modifier, MixedModel.of(model))

    def refuse_groups(self, rank: int, name: str) -> None:
        """
        Refuse quantizers whose groups do not fit into a linear map of low rank.

        Its second factor reads ``rank`` features. vLLM needs whole groups of them; and
        llm-compressor would notice only after calibration, or not at all.

        :param rank: of the maps
        :param name: module name of one of them
        :raises ValueError: naming modifier, group size and rank
        """
        for modifier in self._modifiers:
            if not isinstance(modifier, QuantizationMixin):
                continue
            for scheme in modifier.resolved_config.config_groups.values():
                size = _group_size(scheme)
                if (
                    size is not None
                    and rank % size
                    and is_match(
                        f"{name}.expand", _A_LINEAR, scheme.targets, modifier.ignore
                    )
                ):
                    raise ValueError(
                        f"{_name(modifier)} quantizes in groups of {size}, which do "
                        f"not fit linear maps of rank {rank}. Use a rank that is a "
                        f"multiple of {size}, a smaller group_size, or ignore: "
                        "['re:.*linear[.]expand$']."
                    )

    def refresh(self, state: State, mixed: MixedModel) -> None:
        """
        Let every modifier resolve its targets again, on the linearized model.

        ``on_initialize`` rather than ``initialize``, which refuses to run twice.

        :param state: the session's state
        :param mixed: the linearized model
        """
        for modifier in self._modifiers:
            self._rewrite_mappings(modifier, mixed)
            # AWQ resolves its mappings when its calibration starts.
            if isinstance(
                modifier, (SmoothQuantModifier, QuantizationMixin, SparsityModifierBase)
            ):
                with quantized_attention(state.model):
                    modifier.on_initialize(state, **self._kwargs)

    def restore_mappings(self) -> None:
        """Put back the user's mappings: ``recipe.yaml`` holds what can be replayed."""
        for modifier in self._modifiers:
            if isinstance(modifier, (AWQModifier, SmoothQuantModifier)):
                modifier.mappings = self._user_mappings[id(modifier)]

    def _rewrite_mappings(self, modifier: Modifier, mixed: MixedModel) -> None:
        if isinstance(modifier, AWQModifier):
            mappings = self._user_mappings[id(modifier)]
            modifier.mappings = rewrite_awq(mappings, mixed)
        elif isinstance(modifier, SmoothQuantModifier):
            mappings = self._user_mappings[id(modifier)]
            modifier.mappings = list(rewrite_smoothquant(mappings, mixed))


def check_recipe(
    options: Options,
    model: PreTrainedModel,
    oneshot: Oneshot | None,
    kwargs: dict[str, Any],
) -> Followers | None:
    """
    Return the modifiers after ours in the recipe, all of them checked.

    :param options: our modifier
    :param model: the model before it is linearized
    :param oneshot: the call that runs the recipe, if there is one
    :param kwargs: what ``on_initialize`` was called with
    :return: None outside of a recipe
    :raises ValueError: naming the modifier that cannot be beside ours
    """
    recipe: list[Modifier] = active_session().lifecycle.recipe.modifiers
    ours: object = options
    position = next((i for i, m in enumerate(recipe) if m is ours), None)
    if position is None:  # initialized by hand, outside of a recipe
        return None
    earlier, later = recipe[:position], recipe[position + 1 :]
    if any(isinstance(modifier, Options) for modifier in earlier):
        raise ValueError(
            "the recipe has two NBLModifiers, and the second would rank layers of "
            "a model that the first is about to change. Use one."
        )
    refuse_earlier(earlier)
    if oneshot is not None:
        _check_pipeline(options, oneshot, [*earlier, *later])
    return Followers(later, model, kwargs)


def _check_pipeline(
    options: Options, oneshot: Oneshot, others: Sequence[Modifier]
) -> None:
    pipeline = str(oneshot.dataset_args.pipeline).lower()
    if pipeline == "datafree" and options.statistics is None:
        raise ValueError(
            "NBLModifier needs calibration data, which pipeline='datafree' does "
            "not pass. Use oneshot(pipeline='independent'), the default."
        )
    # Asked again when calibration starts: not every run is oneshot's.
    if pipeline != "independent":
        refuse_shared_pass(others)


def refuse_shared_pass(others: Sequence[Modifier]) -> None:
    """
    Refuse to calibrate in one pass with other modifiers.

    :param others: those of the recipe, or of the pass
    :raises ValueError: naming them
    """
    if others:
        raise ValueError(
            f"NBLModifier shares its calibration pass with "
            f"{', '.join(type(m).__name__ for m in others)}, which would work on "
            "layers that are about to be replaced. Use "
            "oneshot(pipeline='independent'), the default."
        )


def _refuse_post_norms(
    modifier: AWQModifier | SmoothQuantModifier, model: PreTrainedModel
) -> None:
    architecture = architecture_of(model.config.model_type)
    mappings: Sequence[Any] | None = modifier.mappings
    if mappings is None:
        mappings = mappings_of(type(modifier), architecture)
    smooth = [
        mapping.smooth_layer
        if hasattr(mapping, "smooth_layer")
        else tree_leaves(mapping)[-1]
        for mapping in mappings
    ]
    refuse_post_norms(_name(modifier), model, architecture, smooth)


def _mapping_targets(mappings: Sequence[Any] | None) -> list[str]:
    targets = []
    for mapping in mappings or ():
        if hasattr(mapping, "smooth_layer"):
            targets += [mapping.smooth_layer, *mapping.balance_layers]
        else:
            targets += tree_leaves(mapping)
    return targets


def _group_size(scheme: QuantizationScheme) -> int | None:
    """Return how many inputs share a scale, None if it is all of them."""
    size = getattr(scheme.weights, "group_size", None)
    return size if size is not None and size > 0 else None
