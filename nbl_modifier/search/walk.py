"""
A walk through the candidates, one layer after the other: their scores, and the budget
that ends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loguru import logger

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.criteria import CRITERIA
from nbl_modifier.evaluation.perplexity import PerplexityResult
from nbl_modifier.records.compression import HeldoutResult
from nbl_modifier.replacement.surgery import Replacement

from .budget import Budget
from .outcome import NOT_FINITE, Effect, Outcome, finite
from .trials import Trial, Trials

__all__ = ["Step", "Walk"]


@dataclass(frozen=True)
class Step:
    """
    One layer on the way.

    :param index: decoder layer
    :param replacement: what replaces it
    :param loss: of the model with this step and those before it, where measured
    """

    index: int
    replacement: Replacement
    loss: PerplexityResult | None = None


class Walk:
    """
    Scores of the candidates, and steps along them until the budget is used up.

    :param calibration: of all candidates, on the original model
    :param criterion: a key of :data:`CRITERIA`
    :param budget: when to stop
    :param trials: losses on held-out windows; None if neither criterion nor budget asks
    :raises ValueError: if the loss of the original model is not finite
    """

    def __init__(
        self,
        calibration: Calibration,
        criterion: str,
        budget: Budget,
        trials: Trials | None = None,
    ) -> None:
        self.calibration = calibration
        self.criterion = CRITERIA[criterion]
        self.budget = budget
        #: Layers whose loss was not finite when they were tried, and what it was.
        self.broken: dict[int, str] = {}
        #: The original model on held-out windows; None if nobody asks.
        self.base = None if trials is None else trials.original()
        self._trials = trials
        if self.base is not None:
            finite(self.base.loss, "of the model as it is")

    def try_alone(
        self,
        candidates: Mapping[int, Replacement],
        given: Mapping[int, Replacement] | None = None,
    ) -> dict[int, Trial]:
        """
        Try each candidate beside what is given, if the criterion asks for that.

        :param candidates: by decoder layer index
        :param given: put in for all of them, by decoder layer index
        """
        if not self.criterion.tried:
            return {}
        assert self._trials is not None
        return self._trials.single(candidates, given)

    def scores(
        self,
        calibration: Calibration,
        trials: Mapping[int, Trial],
        before: Trial | None,
    ) -> dict[int, float]:
        """
        Return the criterion's value by layer index, lower is taken first.

        :param calibration: that measured the layers
        :param trials: of those that were tried
        :param before: the model without them; None if they were not tried
        """
        if not self.criterion.tried:
            return calibration.scores(self.criterion)
        assert before is not None
        scores: dict[int, float] = {}
        for index, trial in trials.items():
            cosine = calibration.measured[index].cosine
            score = self.criterion.of(Effect.of(trial, before, cosine))
            scores[index] = math.inf if score is None else score
            if score is None:
                self._set_aside(index, trial.loss)
        return scores

    def unfit(self, calibration: Calibration) -> dict[int, str]:
        """
        Return why layers cannot be chosen, of those that cannot.

        :param calibration: that measured them last
        """
        limit, unfit = self.budget.max_nmse, dict(self.broken)
        for index, measurement in calibration.measured.items():
            nmse = measurement.heldout_nmse
            if limit is not None and nmse is not None and nmse > limit:
                unfit[index] = f"held-out NMSE {nmse:.4g} > max_nmse={limit}"
        return unfit

    def take(self, steps: Iterator[Step]) -> tuple[list[Step], str]:
        """
        Take steps as long as the budget lasts.

        :param steps: what to take next, in view of :attr:`broken`
        :return: the steps taken, and what ended them
        """
        budget, taken = self.budget, list[Step]()
        while len(taken) < budget.num_layers:
            step = next(steps, None)
            if step is None:
                if not taken:
                    raise self._none_fits_nmse()
                if budget.max_nmse is None:
                    return taken, "no other layer can be replaced"
                return taken, f"max_nmse={budget.max_nmse}"
            if budget.max_perplexity_increase is not None:
                step = self._measured(step, taken)
                assert step.loss is not None
                if not math.isfinite(step.loss.perplexity):
                    self._set_aside(step.index, step.loss)
                    continue
                if self._increase(step) > budget.max_perplexity_increase:
                    if not taken:
                        raise self._none_fits_perplexity(step)
                    return taken, (
                        f"max_perplexity_increase={budget.max_perplexity_increase} "
                        f"({self._increase(step):.4g} with layer {step.index})"
                    )
            taken.append(step)
            if step.loss is not None:
                logger.info(
                    "NBL: layer {} is number {} by {}, held-out perplexity {:.3f}",
                    step.index,
                    len(taken),
                    self.criterion.name,
                    step.loss.perplexity,
                )
        return taken, budget.reason

    def outcome(
        self,
        order: list[int],
        scores: dict[int, float],
        taken: Sequence[Step],
        binding: str,
        unfit: dict[int, str],
        trials: Mapping[int, Trial],
    ) -> Outcome:
        """
        Return what came of a walk, with its loss where losses are measured.

        :param order: all candidates, the first to be replaced in front
        :param scores: what they were ranked by
        :param taken: the steps of the walk
        :param binding: what ended it
        :param unfit: why a layer could not be chosen whatever its rank
        :param trials: of the layers that were tried alone
        :raises ValueError: if the loss with all of them replaced is not finite
        """
        replacements = {step.index: step.replacement for step in taken}
        figures, heldout = {}, None
        if self.base is not None and self._trials is not None:
            figures = {
                i: Effect.of(trial, self.base, self.calibration.measured[i].cosine)
                for i, trial in trials.items()
            }
        if self.base is not None and self._trials is not None and taken:
            final = taken[-1].loss or self._trials.loss(replacements)
            finite(final, f"with layers {sorted(replacements)} replaced")
            path = [step.loss.perplexity if step.loss else None for step in taken]
            heldout = HeldoutResult(
                num_windows=len(self.base.loss.window_tokens),
                num_tokens=self.base.loss.num_tokens,
                base=self.base.loss.perplexity,
                path=path,
                replaced=final.perplexity,
            )
        return Outcome(order, scores, replacements, binding, unfit, figures, heldout)

    def _set_aside(self, index: int, loss: PerplexityResult) -> None:
        """Have a layer not chosen whose trial says nothing."""
        self.broken[index] = (
            "with it replaced, predictions on held-out windows are not finite "
            f"(perplexity {loss.perplexity:.4g})"
        )
        logger.warning("NBL: layer {}: {}", index, self.broken[index])

    def _measured(self, step: Step, taken: Sequence[Step]) -> Step:
        """Return the step with its loss."""
        if step.loss is not None:
            return step
        assert self._trials is not None
        trial = {s.index: s.replacement for s in (*taken, step)}
        return replace(step, loss=self._trials.loss(trial))

    def _increase(self, step: Step) -> float:
        """Return the increase of perplexity over the base model's, as a fraction."""
        assert step.loss is not None
        assert self.base is not None
        return math.expm1(step.loss.nll_mean - self.base.loss.nll_mean)

    def _none_fits_nmse(self) -> ValueError:
        if self.broken:
            reasons = "; ".join(f"layer {i}: {why}" for i, why in self.broken.items())
            return ValueError(
                f"NBLModifier: no layer can be replaced; {reasons}. {NOT_FINITE}"
            )
        errors = {
            i: m.heldout_nmse
            for i, m in self.calibration.measured.items()
            if m.heldout_nmse is not None
        }
        best = min(errors, key=lambda index: (errors[index], index))
        return ValueError(
            f"NBLModifier.max_nmse: no layer fits the budget {self.budget.max_nmse}; "
            f"the lowest NMSE on held-out tokens is {errors[best]:.4g}, of layer "
            f"{best}. Allow at least that, or give num_layers instead."
        )

    def _none_fits_perplexity(self, step: Step) -> ValueError:
        return ValueError(
            "NBLModifier.max_perplexity_increase: no layer fits the budget "
            f"{self.budget.max_perplexity_increase}; replacing the first one by "
            f"{self.criterion.name}, layer {step.index}, raises perplexity on "
            f"held-out windows by {self._increase(step):.4g} times the base model's. "
            "Allow at least that, choose another criterion, or give num_layers instead."
        )
