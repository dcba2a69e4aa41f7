"""
What llm-compressor 0.14 knows of a run and does not tell its modifiers.
"""

from __future__ import annotations

import inspect

from llmcompressor.entrypoints.oneshot import Oneshot

__all__ = ["running_oneshot"]


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
