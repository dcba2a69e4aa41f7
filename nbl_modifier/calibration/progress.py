"""A run's cost from its model and data, and one line that says how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from loguru import logger
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from nbl_modifier.layer_statistics.windows import CalibrationData

from .cost import Cost, Progress, statistics_bytes
from .phases import Settings, plan

__all__ = ["ProgressLine", "cost_of", "num_windows"]


#: At least so long between two lines of one phase in the log.
LOG_SECONDS = 60.0


class ProgressLine:
    """
    Shows a :class:`Progress` at a terminal, and logs it at the start of each phase and
    every minute.

    Call it with the progress.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._logged, self._logged_at = "", 0.0

    def __call__(self, progress: Progress) -> None:
        """Show ``progress``."""
        if self._bar is None:
            # disable=None: not where the output is a file, which gets the log only
            form = "{desc} |{bar}| {percentage:.0f}%"
            self._bar = tqdm(total=1.0, bar_format=form, leave=False, disable=None)
        self._bar.set_description_str(progress.line, refresh=False)
        self._bar.update(progress.part - self._bar.n)
        now = time.monotonic()
        is_due = progress.phase != self._logged or now - self._logged_at >= LOG_SECONDS
        if is_due and progress.seconds_left() is not None:
            self._logged, self._logged_at = progress.phase, now
            logger.info(progress.line)

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def num_windows(data: CalibrationData, held_out: bool = False) -> int:
    """
    Return the calibration windows of this process.

    :param data: the calibration set
    :param held_out: only those that are held out
    """
    numbers = data.held_out if held_out else range(len(data.batches))
    return sum(len(data.batches[number]["input_ids"]) for number in numbers)


def cost_of(
    model: PreTrainedModel,
    layers: Sequence[nn.Module] | nn.ModuleList,
    data: CalibrationData,
    settings: Settings,
    *,
    normalized: bool,
    kept_apart: bool,
    stored: bool,
) -> Cost:
    """
    Return what a run is going to cost.

    :param model: the causal language model
    :param layers: its decoder layers
    :param data: the calibration set
    :param settings: of the run
    :param normalized: whether the output of the input norm is measured, too
    :param kept_apart: whether held-out windows are measured by themselves
    :param stored: whether statistics are saved
    """
    size = model.config.get_text_config().hidden_size
    tokens = sum(batch["input_ids"].numel() for batch in data.batches)
    head = model.get_output_embeddings()
    of_layer = sum(weight.numel() for weight in layers[0].parameters())
    of_head = 0 if head is None else sum(w.numel() for w in head.parameters())
    streams = 2 if settings.refit else int(settings.greedy)
    return Cost(
        num_layers=settings.num_layers,
        windows=settings.windows,
        tokens=tokens,
        phases=plan(settings),
        head=of_head / max(1, of_layer),
        statistics_bytes=statistics_bytes(
            size, normalized=normalized, held_out=kept_apart, stored=stored
        ),
        stream_bytes=streams * tokens * size * model.dtype.itemsize,
    )
