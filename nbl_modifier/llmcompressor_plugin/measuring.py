"""The way of a modifier of ours through a session, up to what its search found."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Progress
from nbl_modifier.calibration.progress import ProgressLine
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.report.tables import ranking_table
from nbl_modifier.search.outcome import Outcome

from .followers import refuse_shared_pass
from .options import Options
from .plan import Plan, make_plan
from .reporting import log_passes, make_report
from .switches import Switches
from .upstream import batch_in_flight, running_oneshot

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
    _switches: Switches | None = PrivateAttr(default=None)

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
        self._switches = Switches(state.model)
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
        assert self._switches is not None
        plan, model = self._plan, state.model
        self._switches.start_pass()
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
        assert self._switches is not None
        assert calibration is not None
        plan, model = self._plan, state.model
        with self._switches.of_pass:
            calibration.finish()
            outcome = plan.search(self, state, calibration, self._progress)
        self._line.close()
        log_passes(self._progress)
        report = make_report(self, plan, model, calibration, outcome)
        logger.info("NBL ranking\n{}", ranking_table(report))
        self._conclude(state, outcome, report)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """
        Leave nothing switched on.

        llm-compressor also finalizes the modifiers of a run that failed before.
        """
        self.remove_hooks()
        if self._switches is not None:
            self._switches.close()
        self._line.close()
        self._calibration = None
        return True
