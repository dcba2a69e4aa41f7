"""A search from end to end: choose layers, fit them again, train them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.layer_statistics.processes import Ranks

from .budget import Budget
from .choose import choose
from .copying import partly_repeating, repeating
from .distillation import Distillation, distill
from .outcome import Outcome
from .refit import refit
from .trials import Trials

__all__ = ["SearchOptions", "find_replacements"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """
    How layers are chosen, and what is done to them afterwards.

    :param criterion: a key of :data:`CRITERIA`
    :param budget: when to stop
    :param greedy: whether to rank again after each replacement
    :param refit: whether to fit the chosen ones again
    :param epochs: how often to go over the windows to train them in the end
    :param rate: learning rate of that; None: found on held-out windows
    :param per_step: windows of a step of that, in all processes together, a multiple of
        their number; None: one of each process
    :param copying: whether trials and training are on repeating windows, too
    """

    criterion: str
    budget: Budget
    greedy: bool = False
    refit: bool = False
    epochs: int = 0
    rate: float | None = None
    per_step: int | None = None
    copying: bool = False


def find_replacements(
    calibration: Calibration,
    options: SearchOptions,
    passes: Passes | None = None,
    held_out: Collection[int] = (),
) -> Outcome:
    """
    Choose layers, and fit them again, or train them, if asked for.

    Call it where calibration passes may run.

    :param calibration: what the pass over the model measured
    :param options: what is asked for
    :param passes: over the calibration windows of this process; None: everything can
        be told from ``calibration``
    :param held_out: numbers of those to measure losses on
    :raises ValueError: if no layer fits the budget, or a loss is not finite
    """
    criterion, budget = options.criterion, options.budget
    if passes is None:
        return choose(calibration, criterion, budget)
    forward, windows = passes.forward, passes.windows
    architecture = passes.architecture
    forward.start("selection")
    trials = None
    if any(Ranks().gather(bool(held_out))):
        trial_windows = windows.select(held_out)
        repeats = repeating(trial_windows) if options.copying else None
        trials = Trials(forward, architecture, trial_windows, repeats)
    again = passes if options.greedy else None
    outcome = choose(calibration, criterion, budget, trials, again)
    if options.refit:
        forward.start("refit")
        outcome = refit(outcome, passes, trials)
    if options.epochs:
        assert trials is not None
        forward.start("distillation")
        fitted_on = windows.select(set(range(len(windows.batches))) - set(held_out))
        if options.copying:
            fitted_on = partly_repeating(fitted_on)
        distillation = Distillation(
            forward, architecture, fitted_on, trials, options.per_step
        )
        epochs, rate = options.epochs, options.rate
        outcome = distill(outcome, distillation, epochs, rate)
    return outcome
