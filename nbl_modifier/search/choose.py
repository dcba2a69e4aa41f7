"""Which layers to replace: one after the other, ranked once or again each time."""

from __future__ import annotations

from collections.abc import Iterator

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.replacement.surgery import Replacement

from .budget import Budget
from .outcome import Outcome
from .trials import Trials
from .walk import Step, Walk

__all__ = ["choose"]


def choose(
    calibration: Calibration,
    criterion: str,
    budget: Budget,
    trials: Trials | None = None,
    passes: Passes | None = None,
) -> Outcome:
    """
    Rank candidates and take the best ones until the budget is used up.

    :param calibration: of all candidates, on the original model
    :param criterion: a key of :data:`CRITERIA`
    :param budget: when to stop
    :param trials: losses on held-out windows; None if neither criterion nor budget asks
    :param passes: to rank again after each replacement; None: rank once
    :raises ValueError: if no layer fits the budget, or a loss is not finite
    """
    walk = Walk(calibration, criterion, budget, trials)
    if passes is None:
        return _one_shot(walk)
    return _lazily_greedy(walk) if walk.criterion.tried else _greedy(walk, passes)


def _one_shot(walk: Walk) -> Outcome:
    """Rank once: NBL, arXiv:2505.21077, Algorithm 1."""
    calibration = walk.calibration
    trials = walk.try_alone(calibration.replacements)
    scores = walk.scores(calibration, trials, walk.base)
    order = sorted(scores, key=lambda index: (scores[index], index))
    unfit = walk.unfit(calibration)
    chosen: set[int] = set()

    def steps() -> Iterator[Step]:
        for index in order:
            if index in unfit or index in walk.budget.spent(chosen):
                continue
            yield Step(index, calibration.replacements[index])
            if index not in walk.broken:
                chosen.add(index)

    taken, binding = walk.take(steps())
    unfit = walk.budget.spent(chosen) | unfit | walk.broken
    return walk.outcome(order, scores, taken, binding, unfit, trials)


def _greedy(walk: Walk, passes: Passes) -> Outcome:
    """
    Rank again after each replacement, on the partly linear model: paper's F.4.

    :param passes: measure the candidates that are left
    """
    calibration = walk.calibration
    scores = walk.scores(calibration, {}, walk.base)
    chosen: dict[int, Replacement] = {}
    unfit: dict[int, str] = {}

    def steps() -> Iterator[Step]:
        now = calibration
        while True:
            left = scores.keys() - chosen
            unfit.clear()
            unfit.update(walk.budget.spent(chosen) | walk.unfit(now))
            if left <= unfit.keys():
                return
            best = min(left - unfit.keys(), key=lambda i: (scores[i], i))
            yield Step(best, now.replacements[best])
            if best in walk.broken:
                continue
            chosen[best] = now.replacements[best]
            with passes.replaced(chosen):
                now = passes.estimate(left - {best})
            scores.update(walk.scores(now, {}, None))

    taken, binding = walk.take(steps())
    order = [step.index for step in taken]
    order += sorted(scores.keys() - order, key=lambda i: (scores[i], i))
    return walk.outcome(order, scores, taken, binding, unfit, {})


def _lazily_greedy(walk: Walk) -> Outcome:
    """
    Try again after each replacement, but only what may be the best.

    What a layer adds to the harm hardly shrinks as others are replaced beside it,
    so one that was worse before need not be tried (Minoux 1978, "Accelerated
    greedy algorithms"). The maps stay as they were fitted to the original model:
    what they get wrong in the linearized one, distillation sets right.
    """
    calibration = walk.calibration
    first = walk.try_alone(calibration.replacements)
    scores = walk.scores(calibration, first, walk.base)
    unfit = walk.unfit(calibration)
    chosen: dict[int, Replacement] = {}

    def steps() -> Iterator[Step]:
        trials, now = dict(first), walk.base
        fresh = set(trials)

        def left() -> set[int]:
            gone = unfit | walk.broken | walk.budget.spent(chosen)
            return scores.keys() - chosen - gone.keys()

        while left():
            best = min(left(), key=lambda i: (scores[i], i))
            if best not in fresh:
                candidate = {best: calibration.replacements[best]}
                trials |= walk.try_alone(candidate, chosen)
                fresh.add(best)
                scores.update(walk.scores(calibration, {best: trials[best]}, now))
                continue
            yield Step(best, calibration.replacements[best], trials[best].loss)
            if best not in walk.broken:
                chosen[best], now = calibration.replacements[best], trials[best]
                fresh.clear()

    taken, binding = walk.take(steps())
    order = [step.index for step in taken]
    order += sorted(scores.keys() - order, key=lambda i: (scores[i], i))
    unfit |= walk.broken
    return walk.outcome(order, scores, taken, binding, unfit, first)
