"""Which layers to replace: one after the other, ranked once or again each time."""

from __future__ import annotations

from collections.abc import Iterator

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.replacement.surgery import Replacement

from .budget import Budget
from .outcome import Outcome
from .path import Path, Step
from .trials import Trials

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
    path = Path(calibration, criterion, budget, trials)
    if passes is None:
        return _one_shot(path)
    return _lazily_greedy(path) if path.criterion.tried else _greedy(path, passes)


def _one_shot(path: Path) -> Outcome:
    """Rank once: NBL, arXiv:2505.21077, Algorithm 1."""
    calibration = path.calibration
    trials = path.try_alone(calibration.replacements)
    scores = path.scores(calibration, trials, path.base)
    order = sorted(scores, key=lambda index: (scores[index], index))
    unfit = path.unfit(calibration)
    chosen: set[int] = set()

    def steps() -> Iterator[Step]:
        for index in order:
            if index in unfit or index in path.budget.spent(chosen):
                continue
            yield Step(index, calibration.replacements[index])
            if index not in path.broken:
                chosen.add(index)

    taken, binding = path.walk(steps())
    unfit = path.budget.spent(chosen) | unfit | path.broken
    return path.outcome(order, scores, taken, binding, unfit, trials)


def _greedy(path: Path, passes: Passes) -> Outcome:
    """
    Rank again after each replacement, on the partly linear model: paper's F.4.

    :param passes: measure the candidates that are left
    """
    calibration = path.calibration
    scores = path.scores(calibration, {}, path.base)
    chosen: dict[int, Replacement] = {}
    unfit: dict[int, str] = {}

    def steps() -> Iterator[Step]:
        now = calibration
        while True:
            left = scores.keys() - chosen
            unfit.clear()
            unfit.update(path.budget.spent(chosen) | path.unfit(now))
            if left <= unfit.keys():
                return
            best = min(left - unfit.keys(), key=lambda i: (scores[i], i))
            yield Step(best, now.replacements[best])
            if best in path.broken:
                continue
            chosen[best] = now.replacements[best]
            with passes.replaced(chosen):
                now = passes.estimate(left - {best})
            scores.update(path.scores(now, {}, None))

    taken, binding = path.walk(steps())
    order = [step.index for step in taken]
    order += sorted(scores.keys() - order, key=lambda i: (scores[i], i))
    return path.outcome(order, scores, taken, binding, unfit, {})


def _lazily_greedy(path: Path) -> Outcome:
    """
    Try again after each replacement, but only what may be the best.

    What a layer adds to the harm hardly shrinks as others are replaced beside it,
    so one that was worse before need not be tried (Minoux 1978, "Accelerated
    greedy algorithms"). The maps stay as they were fitted to the original model:
    what they get wrong in the linearized one, distillation sets right.
    """
    calibration = path.calibration
    first = path.try_alone(calibration.replacements)
    scores = path.scores(calibration, first, path.base)
    unfit = path.unfit(calibration)
    chosen: dict[int, Replacement] = {}

    def steps() -> Iterator[Step]:
        trials, now = dict(first), path.base
        fresh = set(trials)

        def left() -> set[int]:
            gone = unfit | path.broken | path.budget.spent(chosen)
            return scores.keys() - chosen - gone.keys()

        while left():
            best = min(left(), key=lambda i: (scores[i], i))
            if best not in fresh:
                candidate = {best: calibration.replacements[best]}
                trials |= path.try_alone(candidate, chosen)
                fresh.add(best)
                scores.update(path.scores(calibration, {best: trials[best]}, now))
                continue
            yield Step(best, calibration.replacements[best], trials[best].loss)
            if best not in path.broken:
                chosen[best], now = calibration.replacements[best], trials[best]
                fresh.clear()

    taken, binding = path.walk(steps())
    order = [step.index for step in taken]
    order += sorted(scores.keys() - order, key=lambda i: (scores[i], i))
    unfit |= path.broken
    return path.outcome(order, scores, taken, binding, unfit, first)
