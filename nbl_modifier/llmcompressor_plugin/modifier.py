"""NBLModifier: Neural Block Linearization as an llm-compressor modifier."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

from llmcompressor.core import State, active_session
from llmcompressor.modifiers import ModifierFactory
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
from .reporting import log_choice
from .rules import check_budget
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
    # Those of earlier runs included.
    _linearized: dict[int, LinearizedLayer] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        check_budget(self._values)
        return self

    @property
    def report(self) -> NBLReport | None:
        """What was measured and decided, once calibration has ended."""
        return self._report

    def _conclude(self, state: State, outcome: Outcome, report: NBLReport) -> None:
        """Replace the layers that were chosen, and tell all who have to know."""
        model: PreTrainedModel = state.model
        plan, replacements = self._run.plan, outcome.replacements
        self._report, self._linearized = report, plan.linearized(replacements)
        log_choice(report, plan, model, replacements)
        layers = decoder_layers(model, plan.architecture)
        replace(layers, plan.architecture, replacements)
        # From here on the model must not be saved as what it no longer is, not even
        # if a later modifier fails.
        saving.publish(
            model,
            plan.architecture,
            report=lambda: self._report,
            before=partial(self._convert, model),
        )
        if plan.followers is not None:
            mixed = smoothing.MixedModel(model, plan.architecture, self._linearized)
            plan.followers.refresh(state, mixed)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Make model and configuration those of a linearized checkpoint."""
        super().on_finalize(state, **kwargs)
        if self._report is None:
            return True
        plan = self._run.plan
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

    def _convert(self, model: PreTrainedModel) -> None:
        architecture = self._run.plan.architecture
        convert_in_place(
            model, architecture, self._linearized, criterion=self.criterion
        )


ModifierFactory.register("NBLModifier", NBLModifier)
saving.register()
smoothing.register()
observe_queries()
