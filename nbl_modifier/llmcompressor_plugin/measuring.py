"""The way of a modifier of ours through a session, up to what its search found."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import calibration_forward_context
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Progress
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.progress import ProgressLine
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.layer_statistics.windows import rewind_generator
from nbl_modifier.numerics.products import FastProducts
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.report.tables import ranking_table
from nbl_modifier.search.find import find_replacements
from nbl_modifier.search.outcome import Outcome

from .followers import refuse_shared_pass
from .old_names import translate
from .options import Options
from .plan import Plan, make_plan
from .reporting import log_passes, make_report
from .upstream import (
    FusedAttention,
    batch_in_flight,
    hide_bars,
    keep_causal_mask,
    release_causal_mask,
    running_oneshot,
    show_bars,
    windows_of,
)

__all__ = ["MeasuringModifier"]


class MeasuringModifier(Options, Modifier):
    """
    Measures the layers in a calibration pass, and searches for those to replace.

    What is done with them is up to :meth:`_conclude`. The fields are those of
    :class:`Options`.
    """

    # A property of the class, not a choice: kept out of recipe.yaml.
    requires_calibration_data: bool = Field(default=True, exclude=True)

    _plan: Plan | None = PrivateAttr(default=None)
    _line: ProgressLine = PrivateAttr(default_factory=ProgressLine)
    _progress: Progress = PrivateAttr()
    _passed: set[int] = PrivateAttr(default_factory=set)
    _calibration: Calibration | None = PrivateAttr(default=None)
    _fused_attention: FusedAttention | None = PrivateAttr(default=None)
    _products: FastProducts = PrivateAttr()
    # What is switched on until the modifier is finalized, and within that what is
    # until its search has ended.
    _switches: ExitStack = PrivateAttr(default_factory=ExitStack)
    _pass_switches: ExitStack = PrivateAttr(default_factory=ExitStack)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        own = [name for name in cls.model_fields if name not in Modifier.model_fields]
        fields = translate(cls.__name__, fields, own)
        # start, end, update and index are of training schedules, the rest is of the
        # lifecycle; llm-compressor gives the group.
        unknown = sorted(map(str, set(fields) - {*own, "group"}))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}. Its fields: "
                f"{', '.join(own)}."
            )
        return fields

    @abstractmethod
    def _conclude(self, state: State, outcome: Outcome, report: NBLReport) -> None:
        """
        Do what there is to do with what was found.

        :param state: session state with the model
        :param outcome: of the search
        :param report: of it
        """

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        Check everything that can be checked before calibration.

        :param state: session state with the model and the calibration data
        :raises ValueError: for a field or calibration set that does not fit the model
        :raises NotImplementedError: for an unsupported architecture, recipe or run
        :raises OSError: if the output directory cannot take the checkpoint
        """
        plan = self._plan = make_plan(self, state, running_oneshot(), kwargs)
        if plan.sources.complete:  # the pipeline will not look at the data for us
            batches = plan.sources.data.batches
            masks = [batch["loss_mask"] for batch in batches if "loss_mask" in batch]
            state.loss_masks = masks or None
        # llm-compressor runs the model over the data only where a modifier asks for it.
        self.requires_calibration_data = not plan.sources.complete
        keep_causal_mask()
        self._switches.callback(release_causal_mask)
        self._switches.callback(self._line.close)
        self._switches.push(self._pass_switches)
        # Now, because llm-compressor changes what it decides by when it calibrates.
        self._fused_attention = FusedAttention(state.model)
        self._products = FastProducts()
        self._progress = Progress(plan.cost, self._line)
        if plan.cost.phases:
            logger.info("NBL will take about {}", plan.cost)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Register the hooks that stream activations into statistics.

        :raises ValueError: if other modifiers share this calibration pass
        """
        sharing = [
            m for m in active_session().lifecycle.recipe.modifiers if m is not self
        ]
        refuse_shared_pass(sharing)
        assert self._plan is not None
        plan, model = self._plan, state.model
        self._switch_on()
        calibration = self._calibration = plan.calibration(
            self,
            model,
            self._progress,
            keep=plan.num_replacements(self),
            store=plan.sources.store,
        )
        for index in plan.candidates:
            calibration.watch(
                index, self.register_hook, partial(batch_in_flight, state)
            )

    def _switch_on(self) -> None:
        """Have calibration run as it should, until each stack is closed."""
        until_end = self._pass_switches
        oneshot = running_oneshot()
        if oneshot is not None:
            # Nothing changes during this pass, so running every layer a second time
            # to propagate the change would only double its cost. The pipeline reads
            # the argument layer by layer.
            arguments = oneshot.dataset_args
            until_end.callback(
                setattr, arguments, "propagate_error", arguments.propagate_error
            )
            arguments.propagate_error = False
        # The pipeline draws this pass's samples next. Later passes draw what they would
        # have drawn.
        until_end.callback(torch.random.set_rng_state, rewind_generator())
        # It holds the attention modules, those that are about to be freed too.
        fused, self._fused_attention = self._fused_attention, None
        assert fused is not None
        fused.switch_on()
        until_end.callback(fused.switch_off)
        hide_bars()
        until_end.callback(show_bars)
        # Until the end of the run: the passes of later modifiers are as slow otherwise.
        self._products.switch_on()
        self._switches.callback(self._products.switch_off)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """
        Solve the layers among ``modules`` and free their statistics.

        :param modules: what the pipeline has finished calibrating
        :raises ValueError: naming the layer, if it saw too few tokens
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        assert self._plan is not None
        assert self._calibration is not None
        self._calibration.solve_finished(modules)
        if self._plan.sources.complete:  # no batch has run
            return
        finished = set(map(id, modules))
        layers = decoder_layers(state.model, self._plan.architecture)
        passed = {
            index
            for index, layer in enumerate(layers)
            if not finished.isdisjoint(map(id, layer.modules()))
        }
        new = len(passed - self._passed)
        self._passed |= passed
        self._progress.ran(new * self._progress.cost.windows)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Search for the layers to replace, and conclude.

        :raises RuntimeError: if a layer was never reached by calibration data
        """
        self.remove_hooks()
        calibration, self._calibration = self._calibration, None
        assert self._plan is not None
        assert calibration is not None
        plan, model = self._plan, state.model
        with self._pass_switches:
            calibration.finish()
            _check_seen(plan, calibration)
            outcome = self._search(state, calibration)
        self._line.close()
        log_passes(self._progress)
        report = make_report(self, plan, model, calibration, outcome)
        logger.info("NBL ranking\n{}", ranking_table(report))
        self._conclude(state, outcome, report)

    def _search(self, state: State, calibration: Calibration) -> Outcome:
        """Return which layers to replace, and by what."""
        assert self._plan is not None
        plan, model = self._plan, state.model
        data, passes, held_out = plan.windows(self), None, frozenset[int]()
        if data is not None:
            again = partial(plan.calibration, self, model, self._progress)
            keep, held_out = len(plan.candidates), data.held_out
            passes = Passes(
                PartialForward(model, plan.architecture, self._progress),
                plan.architecture,
                windows_of(state, data),
                lambda streams: again(keep=keep, streams=streams, log_level="DEBUG"),
            )
        # The basic pipeline has left this context by now.
        with calibration_forward_context(model):
            return find_replacements(
                calibration, plan.search_options(self), passes, held_out
            )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """
        Leave nothing switched on.

        llm-compressor also finalizes the modifiers of a run that failed before.
        """
        self.remove_hooks()
        self._switches.close()
        self._calibration = None
        return True


def _check_seen(plan: Plan, calibration: Calibration) -> None:
    """Refuse to go on without a measurement of each layer."""
    unseen = [n for i, n in plan.candidates.items() if i not in calibration.measured]
    if unseen:
        raise RuntimeError(
            f"{unseen[0]}: no activations were seen ({len(unseen)} such layers). "
            "Attention must run as a module: set sequential_targets to the decoder "
            "layer class, or leave it unset."
        )
