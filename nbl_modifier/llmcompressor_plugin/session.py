"""What llm-compressor 0.14 knows of a run and does not tell its modifiers."""

from __future__ import annotations

import inspect

from llmcompressor.core import State
from llmcompressor.entrypoints.oneshot import Oneshot

from nbl_modifier.calibration.observer import BatchInFlight
from nbl_modifier.layer_statistics.windows import CalibrationData, Windows

__all__ = ["batch_in_flight", "running_oneshot", "windows_of"]


def running_oneshot() -> Oneshot | None:
    """
    Return the ``oneshot()`` call that this code runs in, or None.

    llm-compressor hands modifiers neither ``output_dir`` nor the dataset arguments
    (llmcompressor 0.14.0.1, entrypoints/oneshot.py, ``apply_recipe_modifiers``), and a
    bad output directory must be refused before hours of calibration rather than after.
    Modifiers are initialized inside that call, so it is on the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Oneshot):
            return caller
        frame = frame.f_back
    return None


def batch_in_flight(state: State) -> BatchInFlight:
    """
    Return what the session says about the batch that its pipeline runs.

    :param state: the session's
    """
    number = state.current_batch_idx
    return BatchInFlight(
        number,
        state.loss_masks[number] if state.loss_masks else None,
        state.model.config._attn_implementation,
    )


def windows_of(state: State, data: CalibrationData) -> Windows:
    """
    Return the calibration windows, for passes of our own.

    :param state: the session's, which has the masks of what counts once its pipeline
        has run over the data
    :param data: the calibration set, whose masks these are where none had to
    """
    placeholder = getattr(state.model.config, "image_token_id", None)
    return Windows(data.batches, state.loss_masks or data.loss_masks, placeholder)
