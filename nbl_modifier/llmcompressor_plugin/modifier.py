"""NBLModifier: Neural Block Linearization as an llm-compressor modifier."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

from llmcompressor.core import State, active_session
from llmcompressor.modifiers import ModifierFactory
from loguru import logger
from pydantic import PrivateAttr, model_validator
from transformers import PreTrainedModel

from nbl_modifier.hf.checkpoint import convert_in_place
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.replacement.surgery import drop_restored_norms, replace
from nbl_modifier.search.outcome import Outcome

from . import saving, smoothing
from .measuring import MeasuringModifier
from .reporting import warn_if_nothing_is_freed
from .upstream import observe_queries

__all__ = ["NBLModifier"]


class NBLModifier(MeasuringModifier):
    """
    Replace the layers that behave almost linearly by one linear map each, or by none.

    Neural Block Linearization, arXiv:2505.21077. For an attention layer with input X
    and output Y the replacement is the LMMSE estimator ``y = W x + b`` with
    ``W = C_yx C_xx^-1`` and ``b = E[y] - W E[x]``, from calibration activations
    (Algorithm 1). Layers are ranked by the CCA bound on their linearization error,
    ``sum_i (1 - rho_i^2)`` with rho the canonical correlations of the residual stream
    before and after attention (Algorithm 2), or by the error itself; the lowest are
    replaced. A replaced layer has no KV cache.

    Lifecycle, all but the last step in :class:`MeasuringModifier`:

    - on_initialize: check recipe, model, data and output directory
    - on_calibration_start: register hooks on attention and its input norm
    - on_sequential_epoch_end: solve the finished layers, free their statistics
    - on_calibration_end: rank, replace, let later modifiers see the new model
    - on_finalize: turn model and configuration into their linearized classes

    ```yaml
    default_stage:
      default_modifiers:
        NBLModifier: {num_layers: 12}
        GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head]}
    ```

    What the fields mean says :class:`Options`, and docs/modifier.md.
    """

    _report: NBLReport | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        ways = ("num_layers", "layers", "kv_cache_reduction")
        limits = (self.max_nmse, self.max_perplexity_increase)
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1 or (not given and limits == (None, None)):
            raise ValueError(
                "NBLModifier needs one of num_layers (how many layers to "
                "replace), layers (which ones) and kv_cache_reduction (the part of the "
                "KV cache to free), or a limit, max_nmse or max_perplexity_increase, "
                f"got {' and '.join(given) or 'neither'}."
            )
        return self

    @property
    def report(self) -> NBLReport | None:
        """What was measured and decided, once calibration has ended."""
        return self._report

    def _conclude(self, state: State, outcome: Outcome, report: NBLReport) -> None:
        """Replace the layers that were chosen, and tell all who have to know."""
        assert self._plan is not None
        plan, self._report = self._plan, report
        logger.info("NBL replaces {}: {}", sorted(outcome.replacements), report.binding)
        model: PreTrainedModel = state.model
        if report.kv_cache_left is not None:
            warn_if_nothing_is_freed(plan, model, outcome.replacements)
        layers = decoder_layers(model, plan.architecture)
        replace(layers, plan.architecture, outcome.replacements)
        # From here on the model must not be saved as what it no longer is, not even
        # if a later modifier fails.
        saving.publish(
            model,
            plan.architecture,
            report=lambda: self._report,
            before=partial(self._convert, model),
        )
        if plan.followers is not None:
            linearized = self._linearized
            mixed = smoothing.MixedModel(model, plan.architecture, linearized)
            plan.followers.refresh(state, mixed)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Make model and configuration those of a linearized checkpoint."""
        super().on_finalize(state, **kwargs)
        if self._report is None:
            return True
        assert self._plan is not None
        plan = self._plan
        layers = decoder_layers(state.model, plan.architecture)
        if len(layers) == self._report.num_hidden_layers:  # none is gone yet
            for index, spec in self._linearized.items():
                drop_restored_norms(layers[index], plan.architecture, spec)
        self._convert(state.model)
        if plan.followers is not None:
            plan.followers.restore_mappings()
        recipe = active_session().lifecycle.recipe.yaml()
        self._report = dataclasses.replace(self._report, recipe=recipe)
        return True

    @property
    def _linearized(self) -> dict[int, LinearizedLayer]:
        """All linearized layers, those of earlier runs included."""
        assert self._report is not None
        assert self._plan is not None
        layers = dict.fromkeys(self._report.selected_layers, self._plan.spec)
        return layers | dict(self._plan.earlier.layers)

    def _convert(self, model: PreTrainedModel) -> None:
        assert self._plan is not None
        convert_in_place(
            model,
            self._plan.architecture,
            self._linearized,
            criterion=self.criterion,
        )


ModifierFactory.register("NBLModifier", NBLModifier)
saving.register()
smoothing.register()
observe_queries()
