"""
Calibration passes of our own, after the pipeline's: over a model that is partly linear.

Like the pipeline's they go layer by layer: each layer runs once over all windows before
the next one does, and what is in flight is the statistics of one layer and, on the CPU,
the residual stream of all windows at one place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nbl_modifier.architectures import Architecture
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.replacement.surgery import Replacement, replaced

from .calibration import Calibration
from .forward import PartialForward
from .observer import BatchInFlight

__all__ = ["Passes"]


@dataclass
class Passes:
    """
    Passes over the calibration windows.

    :param forward: the model
    :param architecture: its family
    :param windows: all of them, held-out ones included
    :param calibration: makes the statistics of a pass, given ``streams``
    """

    forward: PartialForward
    architecture: Architecture
    windows: Windows
    calibration: Callable[[Mapping[int, Tensor] | None], Calibration]
    _running: int = field(default=-1, init=False)

    def replaced(
        self, replacements: Mapping[int, Replacement]
    ) -> AbstractContextManager[object]:
        """Put replacements into the model while the context lasts."""
        return replaced(self.forward.layers, self.architecture, replacements)

    def estimate(self, indices: Collection[int]) -> Calibration:
        """
        Fit layers to what they do in the model as it is.

        :param indices: of the decoder layers, which have attention
        :return: measurements and replacements
        """
        calibration = self.calibration(None)
        streams: dict[int, Tensor] = {}
        start = 0
        for index in sorted(indices):
            with calibration.failing(), self._watching(calibration, index):
                self._advance(streams, start, index + 1)
            calibration.solve_finished(self.forward.layers[index].modules())
            start = index + 1
        calibration.finish()
        return calibration

    def refit(self, indices: Collection[int]) -> Calibration:
        """
        Fit layers to lead from the linearized model's stream to the original one's.

        In order of depth: by the time a layer is fitted, those before it are replaced
        by what they were fitted to, so its input carries their errors, which it learns
        to make up for as far as they can be told from the stream. Two passes' work,
        whatever the number of layers.

        :param indices: of the decoder layers, none of which is replaced
        :return: replacements, and measurements of how they meet their targets
        """
        linearized: dict[int, Tensor] = {}
        original: dict[int, Tensor] = {}
        calibration = self.calibration(linearized)
        at_linearized = at_original = 0
        with ExitStack() as stack:
            for index in sorted(indices):
                with calibration.failing():
                    self._advance(linearized, at_linearized, index)
                    # The layers replaced so far are behind us: the original runs.
                    with self._watching(calibration, index):
                        self._advance(original, at_original, index + 1)
                calibration.solve_finished(self.forward.layers[index].modules())
                calibration.finish()
                done = {index: calibration.replacements[index]}
                stack.enter_context(self.replaced(done))
                at_linearized, at_original = index, index + 1
        return calibration

    def _advance(self, streams: dict[int, Tensor], start: int, stop: int) -> None:
        """Take the residual stream of every batch from one layer to another."""
        for number, batch in enumerate(self.windows.batches):
            self._running = number
            stream = self.forward.hidden_states(batch, stop, streams.get(number), start)
            if stream is not None:
                streams[number] = stream.cpu()

    @contextmanager
    def _watching(self, calibration: Calibration, index: int) -> Iterator[None]:
        handles: list[RemovableHandle] = []

        def register(module: nn.Module, hook: Any, kind: str, **options: Any) -> None:
            handles.append(getattr(module, f"register_{kind}_hook")(hook, **options))

        calibration.watch(index, register, self._in_flight)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _in_flight(self) -> BatchInFlight:
        masks = self.windows.loss_masks
        return BatchInFlight(
            self._running,
            None if masks is None else masks[self._running],
            self.forward.mask_implementation,
        )
