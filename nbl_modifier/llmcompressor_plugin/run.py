"""A plan that runs: the calibration pass, and the search that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmcompressor.core import State
from llmcompressor.utils.helpers import calibration_forward_context
from torch import Tensor, nn
from transformers import PreTrainedModel

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Progress
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.layers import MeasuredLayers
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.layer_statistics.windows import CalibrationData
from nbl_modifier.search.find import SearchOptions, find_replacements
from nbl_modifier.search.outcome import Outcome

from .options import Options
from .plan import Plan
from .session import batch_in_flight, windows_of

__all__ = ["Run"]


class Run:
    """
    A run of a plan, in the order :meth:`begin`, :meth:`finished`, :meth:`search`.

    :param options: the recipe's
    :param plan: what is done, and on what
    :param progress: told how far it is
    """

    def __init__(self, options: Options, plan: Plan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self._options = options
        self._passed: set[int] = set()

    def begin(self, state: State, register: Callable[..., Any]) -> Calibration:
        """
        Return what the pipeline's pass is measured by, its hooks on the candidates.

        :param state: the session's, with the model
        :param register: registers a hook, as of :meth:`Calibration.watch`
        """
        calibration = self._calibration(
            state.model, keep=self._num_kept, store=self.plan.sources.store
        )
        for index in self.plan.candidates:
            calibration.watch(index, register, partial(batch_in_flight, state))
        return calibration

    def finished(self, model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
        """
        Count the decoder layers that the pipeline has run, each once.

        :param model: the causal language model
        :param modules: what the pipeline has finished calibrating
        """
        if self.plan.sources.complete:  # no batch has run
            return
        finished = set(map(id, modules))
        passed = {
            index
            for index, layer in enumerate(decoder_layers(model, self.plan.architecture))
            if not finished.isdisjoint(map(id, layer.modules()))
        }
        new = len(passed - self._passed)
        self._passed |= passed
        self.progress.ran(new * self.plan.cost.windows)

    def search(self, state: State, calibration: Calibration) -> Outcome:
        """
        Return which layers to replace, and by what.

        :param state: the session's, with the model
        :param calibration: of all candidates, finished
        :raises RuntimeError: if a layer was never reached by calibration data
        :raises ValueError: if no layer fits the budget, or a loss is not finite
        """
        self._check_seen(calibration)
        data, options = self._windows, self._search_options
        # The basic pipeline has left this context by now.
        with calibration_forward_context(state.model):
            if data is None:
                return find_replacements(calibration, options)
            passes = self._passes(state, data)
            return find_replacements(calibration, options, passes, data.held_out)

    def _passes(self, state: State, data: CalibrationData) -> Passes:
        """Return passes of our own, after which any candidate may be chosen."""
        model: PreTrainedModel = state.model
        return Passes(
            PartialForward(model, self.plan.architecture, self.progress),
            self.plan.architecture,
            windows_of(state, data),
            lambda streams: self._calibration(
                model,
                keep=len(self.plan.candidates),
                streams=streams,
                log_level="DEBUG",
            ),
        )

    def _calibration(
        self,
        model: PreTrainedModel,
        *,
        keep: int,
        streams: Mapping[int, Tensor] | None = None,
        store: StatisticsStore | None = None,
        log_level: str = "INFO",
    ) -> Calibration:
        """
        Return what measures the candidates in one pass over the windows.

        :param keep: how many replacements to keep

        The rest is as of :class:`Calibration`.
        """
        plan, options = self.plan, self._options
        layers = decoder_layers(model, plan.architecture)
        solver = LayerSolver(
            layers=MeasuredLayers(
                {index: layers[index] for index in plan.candidates},
                plan.candidates,
                plan.architecture,
                plan.spec,
            ),
            estimator=options.estimator,
            dampening_frac=options.dampening_frac,
            correlations=options.reports_correlations,
            measure_held_out=options.holds_out,
        )
        return Calibration(
            solver,
            Leaderboard(options.criterion, keep),
            held_out=plan.sources.data.held_out,
            streams=streams,
            store=store,
            log_level=log_level,
            progress=self.progress,
        )

    @property
    def _num_kept(self) -> int:
        """How many replacements to keep of those of the pipeline's pass."""
        # Any layer may turn out to be chosen, unless these scores alone decide.
        greedy, budget = self._options.selection == "greedy", self.plan.budget
        all_of_them = self._options.holds_out or greedy or bool(budget.quota)
        return len(self.plan.candidates) if all_of_them else budget.num_layers

    @property
    def _windows(self) -> CalibrationData | None:
        """The windows of passes of our own; None if there are none."""
        data = self.plan.sources.data
        if self._options.holds_out:
            return data
        if self._options.runs_again:
            return replace(data, held_out=frozenset())
        return None

    @property
    def _search_options(self) -> SearchOptions:
        """How layers are chosen, and what is done to them afterwards."""
        options = self._options
        return SearchOptions(
            criterion=options.criterion,
            budget=self.plan.budget,
            greedy=options.selection == "greedy",
            refit=options.refit,
            epochs=options.distill.epochs,
            rate=options.distill.rate,
            per_step=options.distill.windows_per_step,
            copying=options.copying,
        )

    def _check_seen(self, calibration: Calibration) -> None:
        """Refuse to go on without a measurement of each layer."""
        measured = calibration.measured
        unseen = [n for i, n in self.plan.candidates.items() if i not in measured]
        if unseen:
            raise RuntimeError(
                f"{unseen[0]}: no activations were seen ({len(unseen)} such layers). "
                "Attention must run as a module: set sequential_targets to the decoder "
                "layer class, or leave it unset."
            )
