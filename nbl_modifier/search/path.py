"""
Which layers to replace: paths through the candidates, and the budgets that end them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from nbl_modifier.architectures import Architecture
from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Progress
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.criteria import CRITERIA
from nbl_modifier.evaluation.perplexity import PerplexityResult
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.records.compression import HeldoutResult
from nbl_modifier.replacement.surgery import Replacement

from .budget import Budget
from .distillation import Distillation
from .trials import Trial, Trials

__all__ = ["Effect", "Outcome", "Search", "find_replacements"]


@dataclass(frozen=True)
class Step:
    """
    One layer on the path.

    :param index: decoder layer
    :param replacement: what replaces it
    :param loss: of the model with this step and those before it, where measured
    """

    index: int
    replacement: Replacement
    loss: PerplexityResult | None = None


@dataclass(frozen=True)
class Effect:
    """
    What one more replacement does to the model, on held-out windows.

    :param loss: increase of the mean negative log-likelihood, in nats per token; None
        if it is not finite
    :param kl: increase of the divergence of the next-token distributions from the
        original model's, in nats per token; None if it is not finite
    :param cosine: of the layer, see :class:`Measurement`
    """

    loss: float | None
    kl: float | None
    cosine: float

    @classmethod
    def of(cls, trial: Trial, before: Trial, cosine: float) -> Effect:
        """
        Return the difference of two trials.

        :param trial: of the model with the replacement
        :param before: without it
        :param cosine: of the layer
        """
        loss, kl = trial.loss.nll_mean - before.loss.nll_mean, trial.kl - before.kl
        return cls(
            loss if math.isfinite(loss) else None,
            kl if math.isfinite(kl) else None,
            cosine,
        )


@dataclass(frozen=True)
class Outcome:
    """
    What a search found.

    :param order: all candidates, the first to be replaced in front
    :param scores: what they were ranked by; of a chosen layer when it was chosen, of
        the others at the end; infinite if it could not be measured
    :param replacements: of the layers to replace, by decoder layer index
    :param binding: the limit that ended the path, in words
    :param unfit: why a layer could not be chosen whatever its rank, by index
    :param trials: what was measured on held-out windows with one layer replaced alone,
        by decoder layer index
    :param heldout: perplexities on held-out windows, if there are any
    """

    order: list[int]
    scores: dict[int, float]
    replacements: dict[int, Replacement]
    binding: str
    unfit: dict[int, str]
    trials: dict[int, Effect]
    heldout: HeldoutResult | None


class Search:
    """
    Rank candidates and take the best ones until the budget is used up.

    :param criterion: a key of :data:`CRITERIA`
    :param budget: when to stop
    :param trials: losses on held-out windows; None if neither criterion nor budget asks
    """

    def __init__(
        self, criterion: str, budget: Budget, trials: Trials | None = None
    ) -> None:
        self._criterion = CRITERIA[criterion]
        self._budget = budget
        self._trials = trials
        # Layers whose loss was not finite when they were tried, and what it was.
        self._broken: dict[int, str] = {}
        self._base = None if trials is None else trials.original()
        if self._base is not None:
            _finite(self._base.loss, "of the model as it is")

    def one_shot(self, calibration: Calibration) -> Outcome:
        """
        Rank once: NBL, arXiv:2505.21077, Algorithm 1.

        :param calibration: of all candidates, on the original model
        """
        trials = self._try(calibration, {})
        scores = self._scores(calibration, trials, self._base)
        order = sorted(scores, key=lambda index: (scores[index], index))
        unfit = self._unfit(calibration)
        chosen: set[int] = set()

        def steps() -> Iterator[Step]:
            for index in order:
                if index in unfit or index in self._budget.spent(chosen):
                    continue
                yield Step(index, calibration.replacements[index])
                if index not in self._broken:
                    chosen.add(index)

        taken, binding = self._walk(steps(), calibration)
        unfit = self._budget.spent(chosen) | unfit | self._broken
        return self._outcome(order, scores, taken, binding, unfit, trials, calibration)

    def greedy(self, calibration: Calibration, passes: Passes) -> Outcome:
        """
        Rank again after each replacement, on the partly linear model: paper's F.4.

        :param calibration: of all candidates, on the original model
        :param passes: measure the candidates that are left
        """
        if self._criterion.tried:
            return self._lazily_greedy(calibration)
        scores = self._scores(calibration, {}, self._base)
        chosen: dict[int, Replacement] = {}
        unfit: dict[int, str] = {}

        def steps() -> Iterator[Step]:
            now = calibration
            while True:
                left = scores.keys() - chosen
                unfit.clear()
                unfit.update(self._budget.spent(chosen) | self._unfit(now))
                if left <= unfit.keys():
                    return
                best = min(left - unfit.keys(), key=lambda i: (scores[i], i))
                yield Step(best, now.replacements[best])
                if best in self._broken:
                    continue
                chosen[best] = now.replacements[best]
                with passes.replaced(chosen):
                    now = passes.estimate(left - {best})
                scores.update(self._scores(now, {}, None))

        taken, binding = self._walk(steps(), calibration)
        order = [step.index for step in taken]
        order += sorted(scores.keys() - order, key=lambda i: (scores[i], i))
        return self._outcome(order, scores, taken, binding, unfit, {}, calibration)

    def _lazily_greedy(self, calibration: Calibration) -> Outcome:
        """
        Try again after each replacement, but only what may be the best.

        What a layer adds to the harm hardly shrinks as others are replaced beside it,
        so one that was worse before need not be tried (Minoux 1978, "Accelerated
        greedy algorithms"). The maps stay as they were fitted to the original model:
        what they get wrong in the linearized one, distillation sets right.

        :param calibration: of all candidates, on the original model
        """
        first = self._try(calibration, {})
        scores = self._scores(calibration, first, self._base)
        unfit = self._unfit(calibration)
        chosen: dict[int, Replacement] = {}

        def steps() -> Iterator[Step]:
            trials, now = dict(first), self._base
            fresh = set(trials)

            def left() -> set[int]:
                gone = unfit | self._broken | self._budget.spent(chosen)
                return scores.keys() - chosen - gone.keys()

            while left():
                best = min(left(), key=lambda i: (scores[i], i))
                if best not in fresh:
                    candidate = {best: calibration.replacements[best]}
                    assert self._trials is not None
                    trials |= self._trials.single(candidate, chosen)
                    fresh.add(best)
                    scores.update(self._scores(calibration, {best: trials[best]}, now))
                    continue
                yield Step(best, calibration.replacements[best], trials[best].loss)
                if best not in self._broken:
                    chosen[best], now = calibration.replacements[best], trials[best]
                    fresh.clear()

        taken, binding = self._walk(steps(), calibration)
        order = [step.index for step in taken]
        order += sorted(scores.keys() - order, key=lambda i: (scores[i], i))
        unfit |= self._broken
        return self._outcome(order, scores, taken, binding, unfit, first, calibration)

    def refit(self, outcome: Outcome, passes: Passes) -> Outcome:
        """
        Return the same choice with refitted replacements, see :meth:`Passes.refit`.

        :param outcome: of this search
        :param passes: over the calibration windows
        """
        replacements = passes.refit(outcome.replacements).replacements
        heldout = outcome.heldout
        if heldout is None or self._trials is None:
            return replace(outcome, replacements=replacements)
        before = self._trials.together(outcome.replacements)
        after = self._trials.together(replacements)
        _finite(after.loss, "of the refitted model")
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

    def distill(
        self,
        outcome: Outcome,
        distillation: Distillation,
        epochs: int,
        rate: float | None,
    ) -> Outcome:
        """
        Return the same choice with trained replacements, see :class:`Distillation`.

        :param outcome: of this search, whose layers have maps
        :param distillation: on windows of its own, tried on those of this search
        :param epochs: how often it goes over its windows
        :param rate: learning rate; None: found on the windows of this search
        """
        trained, trial = distillation.run(outcome.replacements, epochs, rate)
        assert outcome.heldout is not None
        distilled = _finite(trial.loss, "of the distilled model")
        heldout = replace(outcome.heldout, distilled=distilled.perplexity)
        return replace(outcome, replacements=trained, heldout=heldout)

    def _outcome(
        self,
        order: list[int],
        scores: dict[int, float],
        taken: Sequence[Step],
        binding: str,
        unfit: dict[int, str],
        trials: Mapping[int, Trial],
        calibration: Calibration,
    ) -> Outcome:
        replacements = {step.index: step.replacement for step in taken}
        figures, heldout = {}, None
        if self._base is not None and self._trials is not None:
            figures = {
                i: Effect.of(trial, self._base, calibration.measured[i].cosine)
                for i, trial in trials.items()
            }
            final = taken[-1].loss or self._trials.loss(replacements)
            _finite(final, f"with layers {sorted(replacements)} replaced")
            path = [step.loss.perplexity if step.loss else None for step in taken]
            heldout = HeldoutResult(
                num_windows=len(self._base.loss.window_tokens),
                num_tokens=self._base.loss.num_tokens,
                base=self._base.loss.perplexity,
                path=path,
                replaced=final.perplexity,
            )
        return Outcome(order, scores, replacements, binding, unfit, figures, heldout)

    def _try(
        self, calibration: Calibration, given: Mapping[int, Replacement]
    ) -> dict[int, Trial]:
        if not self._criterion.tried:
            return {}
        assert self._trials is not None
        return self._trials.single(calibration.replacements, given)

    def _scores(
        self,
        calibration: Calibration,
        trials: Mapping[int, Trial],
        before: Trial | None,
    ) -> dict[int, float]:
        if not self._criterion.tried:
            return calibration.scores()
        assert before is not None
        scores: dict[int, float] = {}
        for index, trial in trials.items():
            cosine = calibration.measured[index].cosine
            score = self._criterion.of(Effect.of(trial, before, cosine))
            scores[index] = math.inf if score is None else score
            if score is None:
                self._set_aside(index, trial.loss)
        return scores

    def _set_aside(self, index: int, loss: PerplexityResult) -> None:
        """Have a layer not chosen whose trial says nothing."""
        self._broken[index] = (
            "with it replaced, predictions on held-out windows are not finite "
            f"(perplexity {loss.perplexity:.4g})"
        )
        logger.warning("NBL: layer {}: {}", index, self._broken[index])

    def _unfit(self, calibration: Calibration) -> dict[int, str]:
        """Return why layers cannot be chosen, of those that cannot."""
        limit, unfit = self._budget.max_nmse, dict(self._broken)
        for index, measurement in calibration.measured.items():
            nmse = measurement.heldout_nmse
            if limit is not None and nmse is not None and nmse > limit:
                unfit[index] = f"held-out NMSE {nmse:.4g} > max_nmse={limit}"
        return unfit

    def _walk(
        self, steps: Iterator[Step], calibration: Calibration
    ) -> tuple[list[Step], str]:
        """
        Take steps as long as the budget lasts.

        :return: the steps taken, and what ended them
        """
        budget, taken = self._budget, list[Step]()
        while len(taken) < budget.num_layers:
            step = next(steps, None)
            if step is None:
                if not taken:
                    raise self._none_fits_nmse(calibration)
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
                    self._criterion.name,
                    step.loss.perplexity,
                )
        return taken, budget.reason

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
        assert self._base is not None
        return math.expm1(step.loss.nll_mean - self._base.loss.nll_mean)

    def _none_fits_nmse(self, calibration: Calibration) -> ValueError:
        if self._broken:
            reasons = "; ".join(f"layer {i}: {why}" for i, why in self._broken.items())
            return ValueError(
                f"NBLModifier: no layer can be replaced; {reasons}. {_NOT_FINITE}"
            )
        errors = {
            i: m.heldout_nmse
            for i, m in calibration.measured.items()
            if m.heldout_nmse is not None
        }
        best = min(errors, key=lambda index: (errors[index], index))
        return ValueError(
            f"NBLModifier.max_nmse: no layer fits the budget {self._budget.max_nmse}; "
            f"the lowest NMSE on held-out tokens is {errors[best]:.4g}, of layer "
            f"{best}. Allow at least that, or give num_layers instead."
        )

    def _none_fits_perplexity(self, step: Step) -> ValueError:
        return ValueError(
            "NBLModifier.max_perplexity_increase: no layer fits the budget "
            f"{self._budget.max_perplexity_increase}; replacing the first one by "
            f"{self._criterion.name}, layer {step.index}, raises perplexity on "
            f"held-out windows by {self._increase(step):.4g} times the base model's. "
            "Allow at least that, choose another criterion, or give num_layers instead."
        )


_NOT_FINITE = (
    "Look for infinite values or NaN in the model's weights, or load it in a dtype "
    "that has the range of its logits, bfloat16 or float32."
)


def _finite(loss: PerplexityResult, subject: str) -> PerplexityResult:
    """
    Return a loss that can be compared and reported.

    :param subject: what it is of, for the message
    :raises ValueError: if it is not finite
    """
    if math.isfinite(loss.perplexity):
        return loss
    raise ValueError(
        f"perplexity on held-out windows {subject}: must be finite, got "
        f"{loss.perplexity}. {_NOT_FINITE}"
    )


def find_replacements(
    model: PreTrainedModel,
    calibration: Calibration,
    new_calibration: Callable[[Mapping[int, Tensor] | None], Calibration],
    windows: Windows | None,
    held_out: Collection[int],
    architecture: Architecture,
    budget: Budget,
    *,
    criterion: str,
    greedy: bool,
    refit: bool,
    distill_epochs: int,
    distill_rate: float | None,
    progress: Progress,
) -> Outcome:
    """
    Choose layers, and fit them again, or train them, if asked for.

    Call it where calibration passes may run.

    :param model: the causal language model
    :param calibration: what the pass over it measured
    :param new_calibration: for further passes, given ``streams``
    :param windows: the calibration set; None: everything can be told from
        ``calibration``
    :param held_out: numbers of the batches to measure losses on
    :param architecture: the model's family
    :param budget: when to stop
    :param criterion: as in :class:`Search`
    :param greedy: whether to rank again after each replacement
    :param refit: whether to fit the chosen ones again
    :param distill_epochs: how often to go over the windows to train them in the end
    :param distill_rate: learning rate of that; None: found on held-out windows
    :param progress: of the run
    """
    if windows is None:
        return Search(criterion, budget).one_shot(calibration)
    progress.start("selection")
    forward = PartialForward(model, architecture, progress)
    passes = Passes(forward, architecture, windows, new_calibration)
    trials = None
    if held_out:
        trials = Trials(forward, architecture, windows.select(held_out))
    search = Search(criterion, budget, trials)
    if greedy:
        outcome = search.greedy(calibration, passes)
    else:
        outcome = search.one_shot(calibration)
    if refit:
        progress.start("refit")
        outcome = search.refit(outcome, passes)
    if distill_epochs:
        assert trials is not None
        progress.start("distillation")
        fitted_on = windows.select(set(range(len(windows.batches))) - set(held_out))
        distillation = Distillation(forward, architecture, fitted_on, trials)
        outcome = search.distill(outcome, distillation, distill_epochs, distill_rate)
    return outcome
