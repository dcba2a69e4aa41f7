# SPDX-License-Identifier: Apache-2.0
"""Measure the model between the modifiers of a recipe."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from llmcompressor.recipe import Recipe

    # [model] -> any figure
    Measure = Callable[[torch.nn.Module], Any]

BASE = "base"


def with_probes(recipe: Recipe, measure: Measure) -> tuple[Recipe, dict[str, Any]]:
    """
    Return a recipe that calls ``measure`` before its first and after each modifier.

    Works with llm-compressor's ``independent`` pipeline, which gives each modifier an
    epoch of its own: a probe asks for no data, so its epoch only calls it with the
    model. The probes take themselves out of the recipe before it is saved.

    :param recipe: the user's recipe, left as it is
    :param measure: called with the model
    :return: the recipe to run, and a dictionary that fills as it runs: ``base``, then
        ``after <modifier>`` for each modifier
    """
    results: dict[str, Any] = {}
    probe = _probe_class(measure, results)
    modifiers = [probe(label=BASE)]
    labels = _labels([type(modifier).__name__ for modifier in recipe.modifiers])
    for modifier, label in zip(recipe.modifiers, labels, strict=True):
        modifiers += [modifier, probe(label=label)]
    return recipe.model_copy(update={"modifiers": modifiers}), results


def _labels(names: list[str]) -> list[str]:
    """Number the names that occur more than once."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        number = f" {seen[name]}" if names.count(name) > 1 else ""
        labels.append(f"after {name}{number}")
    return labels


@contextlib.contextmanager
def _uncalibrated_disabled(model: torch.nn.Module) -> Iterator[None]:
    """
    Let quantizers that have not had their epoch be without effect.

    They attach before the first epoch and are disabled then, but the calibration passes
    of other modifiers end by enabling all of them (llmcompressor 0.14.0.1,
    utils/helpers.py, ``DisableQuantization``), with scales that hold anything yet.
    """
    waiting: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "quantization_status", None) == "initialized"
    ]
    enabled = [getattr(module, "quantization_enabled", True) for module in waiting]
    for module in waiting:
        module.quantization_enabled = False
    try:
        yield
    finally:
        for module, value in zip(waiting, enabled, strict=True):
            module.quantization_enabled = value


def _probe_class(measure: Measure, results: dict[str, Any]) -> type:
    """Return the modifier; a function because llm-compressor is imported lazily."""
    from llmcompressor.core import active_session
    from llmcompressor.modifiers import Modifier

    class PerplexityProbe(Modifier):
        """
        Calls ``measure`` in its own epoch and changes nothing.

        :param label: key of the result
        """

        label: str

        def on_initialize(self, state: Any, **kwargs: Any) -> bool:  # noqa: ARG002
            return True

        def on_calibration_start(
            self,
            state: Any,
            event: Any,  # noqa: ARG002
            **kwargs: Any,  # noqa: ARG002
        ) -> None:
            with _uncalibrated_disabled(state.model):
                results[self.label] = measure(state.model)

        def on_finalize(self, state: Any, **kwargs: Any) -> bool:  # noqa: ARG002
            """Take all probes out: recipe.yaml is written from this list next."""
            recipe = active_session().lifecycle.recipe
            # A new list: the session is iterating over the old one right now.
            recipe.modifiers = [
                modifier
                for modifier in recipe.modifiers
                if not isinstance(modifier, PerplexityProbe)
            ]
            return True

    return PerplexityProbe
