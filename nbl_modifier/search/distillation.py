"""
Training the maps until the whole model predicts as the original did.

A fit, and a refit, weigh every direction of the residual stream alike; what the layers
behind make of an error they cannot know. Here the error that counts is the divergence
of the next-token distributions (Hinton et al. 2015, arXiv:1503.02531), on the same
calibration windows, without labels. The fitted maps are where it starts, and an epoch
that does not help on held-out windows is not kept.

A step is taken on one window, or on one of each process: these have the same maps, and
add up their gradients.

With the maps, the gains of the layers' norms are trained, a few thousand numbers: they
let the layers that are kept weigh anew what the maps cannot tell them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from compressed_tensors.offload import disable_onloading, update_offload_parameter
from loguru import logger
from torch import Tensor, nn

from nbl_modifier.architectures import Architecture
from nbl_modifier.calibration.forward import PartialForward, calling
from nbl_modifier.hf.modeling_nbl import LowRankLinear
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.numerics.products import FastProducts
from nbl_modifier.replacement.surgery import Replacement, execution_device, replaced

from .muon import Muon
from .outcome import Outcome, finite
from .predictions import divergence, target_tokens
from .schedule import Schedule
from .trained import (
    ChannelSums,
    Inputs,
    TrainedGain,
    TrainedMap,
    trained_gains,
    trained_maps,
    using,
)
from .trials import OriginalLogits, Trial, Trials

__all__ = ["RATES", "Distillation", "distill"]

# An epoch that brings the model nearer by less than this part is the last.
_LEAST_GAIN = 0.01
# After an epoch that brings it no nearer, the next one starts again at this part of the
# rate.
_LOWERED = 1 / 3
# Of the gain of the best rate tried, what a lower one must have to be taken instead.
_ENOUGH = 0.75
#: Learning rates that are tried where none is given, each in a few steps; as many give
#: the spread of what the maps read.
RATES = (0.03, 0.1, 0.3)


@dataclass(frozen=True)
class _Best:
    """
    The best there was so far.

    :param replacements: by decoder layer index
    :param trial: of the model with them and the gains
    :param gains: of the norms, ``[d]``; empty: the original ones
    """

    replacements: Mapping[int, Replacement]
    trial: Trial
    gains: Mapping[nn.Module, Tensor] = field(default_factory=dict)


class Distillation:
    """
    Distillation of a model into the same model with layers replaced.

    :param forward: the model
    :param architecture: its family
    :param windows: to train on, of this process
    :param trials: on windows that are neither trained nor fitted on
    :param per_step: as of :class:`Schedule`. One process that takes two windows a step
        finds what two find that take one each, up to the order of summation
    :raises ValueError: as :class:`Schedule`
    """

    def __init__(
        self,
        forward: PartialForward,
        architecture: Architecture,
        windows: Windows,
        trials: Trials,
        per_step: int | None = None,
    ) -> None:
        self._ranks = Ranks()
        self._forward = forward
        self._architecture = architecture
        self._windows = windows.one_by_one()
        self._trials = trials
        numbers = range(len(self._windows.batches))
        self._tokens = [int(self._windows.targets(i).sum()) for i in numbers]
        self._schedule = Schedule(len(numbers), per_step)
        self._original = OriginalLogits(forward, self._windows)
        self._undone: Callable[[], AbstractContextManager[None]] = nullcontext

    def run(
        self, replacements: Mapping[int, Replacement], epochs: int, rate: float | None
    ) -> tuple[dict[int, Replacement], Trial]:
        """
        Return the trained replacements, and how they do on the held-out windows.

        Muon. Steps are in proportion to each map's own spread: the first step moves an
        output by at most ``rate`` times its standard deviation, on an input as large as
        inputs are. What sets its size is no gradient, so a few massive tokens do not.

        The trained gains are put into the model, which is as it was if this fails.

        :param replacements: with weights, by decoder layer index
        :param epochs: passes over the windows, >= 1
        :param rate: learning rate, dimensionless; None: the one of a few that brings
            the model nearest to the original in a few steps
        """
        layers, architecture = self._forward.layers, self._architecture
        before = self._trials.together(replacements)
        with self._ranks.failing_together():
            for number in range(len(self._windows.batches)):
                self._original.run(number)  # while the gains are the original's
        with self._frozen(), replaced(layers, architecture, replacements) as undone:
            self._undone = undone
            inputs = self._inputs(replacements)
            if rate is None:
                rate = self._find_rate(replacements, inputs, before.kl)
            best = self._run_epochs(_Best(replacements, before), inputs, epochs, rate)
        for norm, values in best.gains.items():
            update_offload_parameter(norm, "weight", values)
        return dict(best.replacements), best.trial

    def _run_epochs(
        self, best: _Best, inputs: Inputs, epochs: int, rate: float
    ) -> _Best:
        """
        Train, an epoch after the other, as long as it helps.

        :param best: where to start
        :return: the best there was
        """
        start, before = best.replacements, best.trial.kl
        maps = trained_maps(start, inputs)
        gains = trained_gains(self._forward.layers[min(start) :])
        for epoch in range(epochs):
            # Each epoch anneals: what is measured at its end is at rest.
            self._train(maps, gains, rate, self._schedule.steps(epoch))
            trained, trial = self._try(maps, gains)
            gained = best.trial.kl - trial.kl
            logger.info(
                "NBL: distillation, epoch {} of at most {}: divergence from the "
                "original model {:.5f} on held-out windows, {:.5f} before",
                epoch + 1,
                epochs,
                trial.kl,
                before,
            )
            if not gained > 0:  # so, too, if it is not a number
                maps, rate = trained_maps(best.replacements, inputs), rate * _LOWERED
                for gain in gains:
                    gain.restart(best.gains.get(gain.norm))
                continue
            stored = {gain.norm: gain.stored().detach() for gain in gains}
            best = _Best(trained, trial, stored)
            if gained < _LEAST_GAIN * before:
                break
        if best.trial.kl == before:
            logger.warning(
                "NBL: distillation brought the model no nearer to the original on "
                "held-out windows, so the maps stay as they were fitted. Use a lower "
                "distill: {{rate}} than {:g}, or more calibration samples.",
                rate / _LOWERED,
            )
        return best

    def _find_rate(
        self, replacements: Mapping[int, Replacement], inputs: Inputs, before: float
    ) -> float:
        """Return a rate for all windows, by what brings the model near in a few."""
        steps = self._schedule.few()
        found = dict[float, float]()
        for rate in RATES:
            maps = trained_maps(replacements, inputs)
            gains = trained_gains(self._forward.layers[min(replacements) :])
            self._train(maps, gains, rate, steps)
            _, trial = self._try(maps, gains)
            found[rate] = trial.kl if math.isfinite(trial.kl) else math.inf
        gained = {rate: before - kl for rate, kl in found.items()}
        enough = _ENOUGH * max(gained.values())
        best = min((rate for rate in RATES if gained[rate] >= enough), default=RATES[0])
        # A few windows bear a higher rate than many do: steps in random directions add
        # up like the root of their number.
        best *= math.sqrt(len(steps) / self._schedule.num_steps)
        best = float(f"{best:.2g}")  # what is logged is what it takes to do it again
        logger.info(
            "NBL: distill: {{rate: {:g}}} for {} steps on {} windows, by the "
            "divergences after {} steps ({}; {:.5f} before)",
            best,
            self._schedule.num_steps,
            self._schedule.num_windows,
            len(steps),
            ", ".join(f"{rate:g}: {kl:.5f}" for rate, kl in sorted(found.items())),
            before,
        )
        return best

    def _try(
        self, maps: Mapping[int, TrainedMap], gains: Sequence[TrainedGain]
    ) -> tuple[dict[int, Replacement], Trial]:
        """Return the maps as they are now, and how they do on the held-out windows."""
        trained = {index: each.replacement() for index, each in maps.items()}
        with self._undone(), using(gains):
            return trained, self._trials.together(trained)

    def _train(
        self,
        maps: Mapping[int, TrainedMap],
        gains: Sequence[TrainedGain],
        rate: float,
        steps: Sequence[Sequence[int]],
    ) -> None:
        """Take a step after the other, each on the windows of all processes."""
        trained = [each for m in maps.values() for each in m.trained(rate)]
        trained += [gain.trained(rate) for gain in gains]
        dtypes = {each.dtype for each in maps.values()}
        half = dtypes == {torch.bfloat16}
        dtype = torch.bfloat16 if half else torch.float32
        optimizer = Muon(trained, len(steps), dtype, self._ranks)
        mine = [[i for i in step if self._tokens[i] > 0] for step in steps]
        counts = self._ranks.gather([len(numbers) for numbers in mine])
        with self._running(maps), FastProducts():
            for numbers, *of_each in zip(mine, *counts, strict=True):
                with self._ranks.failing_together():
                    for number in numbers:
                        self._differentiate(number, min(maps), gains, sum(of_each))
                if sum(of_each) > 0:
                    optimizer.step()
                else:
                    optimizer.skip()

    def _differentiate(
        self, number: int, start: int, gains: Sequence[TrainedGain], windows: int
    ) -> None:
        """
        Add the gradient of a window's mean divergence, over the windows of the step.

        :param start: the first decoder layer with a map
        """
        targets = target_tokens(self._windows, number)
        with self._undone():
            original = self._original.of(number)
        with torch.enable_grad(), using(gains):
            batch = self._windows.batches[number]
            logits = self._forward.differentiable_logits(batch, start)
            mean = divergence(targets, logits, original) / self._tokens[number]
            (mean / windows).backward()

    def _inputs(self, replacements: Mapping[int, Replacement]) -> Inputs:
        """Return mean and spread of what each map reads in the linearized model."""
        sums = {index: ChannelSums() for index in replacements}
        with self._ranks.failing_together(), ExitStack() as stack:
            for index, each in sums.items():
                hook = self._linear(index).register_forward_pre_hook(each.hook)
                stack.callback(hook.remove)
            for number in chain.from_iterable(self._schedule.few()):
                for each in sums.values():
                    each.counted = self._windows.targets(number)
                batch = self._windows.batches[number]
                self._forward.hidden_states(batch, max(replacements) + 1)
        for index, each in sums.items():
            each.pool(self._ranks, execution_device(self._linear(index)))
        return {index: each.mean_and_spread() for index, each in sums.items()}

    def _linear(self, index: int) -> nn.Linear | LowRankLinear:
        """Return the map inside a replaced layer."""
        layer = self._forward.layers[index]
        if not hasattr(layer, "linear"):
            layer = layer.get_submodule(self._architecture.attention)
        found = layer.linear
        assert isinstance(found, (nn.Linear, LowRankLinear))
        return found

    @contextmanager
    def _running(self, maps: Mapping[int, TrainedMap]) -> Iterator[None]:
        with ExitStack() as stack:
            for index, each in maps.items():
                stack.enter_context(calling(self._linear(index), each))
            yield

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Ask for no gradient of the model's own weights while the context lasts."""
        # of an offloaded weight the one that is kept, not a copy that computes
        with disable_onloading():
            weights = [w for w in self._forward.parameters() if w.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)


def distill(
    outcome: Outcome, distillation: Distillation, epochs: int, rate: float | None
) -> Outcome:
    """
    Return the same choice with trained replacements, see :class:`Distillation`.

    :param outcome: of a search, whose layers have maps
    :param distillation: on windows of its own, tried on those of the search
    :param epochs: how often it goes over its windows
    :param rate: learning rate; None: found on the windows of the search
    :raises ValueError: if the loss of the distilled model is not finite
    """
    trained, trial = distillation.run(outcome.replacements, epochs, rate)
    assert outcome.heldout is not None
    distilled = finite(trial.loss, "of the distilled model")
    heldout = replace(outcome.heldout, distilled=distilled.perplexity)
    return replace(outcome, replacements=trained, heldout=heldout)
