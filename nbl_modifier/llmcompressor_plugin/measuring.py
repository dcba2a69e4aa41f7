"""The way of a modifier of ours through a session, up to what its search found."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr
from torch import nn

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Progress
from nbl_modifier.calibration.progress import ProgressLine
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.search.outcome import Outcome

from .followers import refuse_shared_pass
from .options import Options
from .plan import make_plan
from .reporting import log_cost, log_ranking, make_report
from .run import Run
from .session import running_oneshot
from .switches import Switches

__all__ = ["MeasuringModifier"]


class MeasuringModifier(Options, Modifier):
    """
    Measures the layers in a calibration pass, and searches for those to replace.

    What is done with them is up to :meth:`_conclude`. The fields are those of
    :class:`Options`.
    """

    # A property of the class, not a choice: kept out of recipe.yaml.
    requires_calibration_data: bool = Field(default=True, exclude=True)

    # There from on_initialize on, before which llm-compressor calls nothing.
    _run: Run = PrivateAttr()
    _switches: Switches = PrivateAttr()
    # While the pipeline runs.
    _calibration: Calibration | None = PrivateAttr(default=None)

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
        plan = make_plan(self, state, running_oneshot(), kwargs)
        # llm-compressor runs the model over the data only where a modifier asks for it.
        self.requires_calibration_data = not plan.sources.complete
        self._switches = Switches(state.model)
        line = ProgressLine()
        self._switches.of_pass.callback(line.close)
        self._run = Run(self, plan, Progress(plan.cost, line))
        log_cost(plan.cost)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Register the hooks that stream activations into statistics.

        :raises ValueError: if other modifiers share this calibration pass
        """
        recipe: list[Modifier] = active_session().lifecycle.recipe.modifiers
        refuse_shared_pass([modifier for modifier in recipe if modifier is not self])
        self._switches.start_pass()
        self._calibration = self._run.begin(state, self.register_hook)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """
        Solve the layers among ``modules`` and free their statistics.

        :param modules: what the pipeline has finished calibrating
        :raises ValueError: naming the layer, if it saw too few tokens
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        assert self._calibration is not None
        self._calibration.solve_finished(modules)
        self._run.finished(state.model, modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Search for the layers to replace, and conclude.

        :raises RuntimeError: if a layer was never reached by calibration data
        """
        self.remove_hooks()
        calibration, self._calibration = self._calibration, None
        assert calibration is not None
        with self._switches.of_pass:
            calibration.finish()
            outcome = self._run.search(state, calibration)
        report = make_report(self, self._run.plan, state.model, calibration, outcome)
        log_ranking(report, self._run.progress)
        self._conclude(state, outcome, report)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """
        Leave nothing switched on.

        llm-compressor also finalizes the modifiers of a run that failed before.
        """
        self.remove_hooks()
        self._switches.close()
        self._calibration = None
        return True
