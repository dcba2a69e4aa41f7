"""Fitting the chosen layers again, to what those before them make of their input."""

from __future__ import annotations

from dataclasses import replace

from loguru import logger

from nbl_modifier.calibration.passes import Passes

from .outcome import Outcome, finite
from .trials import Trials

__all__ = ["refit"]


def refit(outcome: Outcome, passes: Passes, trials: Trials | None = None) -> Outcome:
    """
    Return the same choice with refitted replacements, see :meth:`Passes.refit`.

    :param outcome: of a search
    :param passes: over the calibration windows
    :param trials: what it is tried on before and after; None: it is taken as it is
    :raises ValueError: if the loss of the refitted model is not finite
    """
    replacements = passes.refit(outcome.replacements).replacements
    heldout = outcome.heldout
    if heldout is None or trials is None:
        return replace(outcome, replacements=replacements)
    before = trials.together(outcome.replacements)
    after = trials.together(replacements)
    finite(after.loss, "of the refitted model")
    heldout = replace(heldout, refitted=after.loss.perplexity)
    if not after.kl < before.kl:
        logger.warning(
            "NBL: refit brought the model no nearer to the original on held-out "
            "windows (divergence {:.5f}, {:.5f} before), so the maps stay as they "
            "were fitted.",
            after.kl,
            before.kl,
        )
        return replace(outcome, heldout=heldout)
    return replace(outcome, replacements=replacements, heldout=heldout)
