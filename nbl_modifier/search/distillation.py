"""
Training the maps until the whole model predicts as the original did.

A fit, and a refit, weigh every direction of the residual stream alike; what the layers
behind make of an error they cannot know. Here the error that counts is the divergence
of the next-token distributions (Hinton et al. 2015, arXiv:1503.02531), on the same
calibration windows, without labels. The fitted maps are where it starts, and an epoch
that does not help on held-out windows is not kept.

With the maps, the gains of the layers' norms are trained, a few thousand numbers: they
let the layers that are kept weigh anew what the maps cannot tell them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import Tensor, nn
from torch.nn.functional import linear

from nbl_modifier.architectures import Architecture
from nbl_modifier.calibration.forward import PartialForward, calling
from nbl_modifier.hf.modeling_nbl import LowRankLinear
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.numerics.products import FastProducts
from nbl_modifier.replacement.surgery import Replacement, replaced

from .muon import Muon, Trained
from .trials import OriginalLogits, Trial, Trials, divergence, target_tokens

__all__ = ["FEW_WINDOWS", "RATES", "Distillation"]

# Channels of x that hardly vary are trained as if they varied by this much, times the
# root mean square over channels: their weights could grow without changing any loss.
_LEAST_SPREAD = 1e-2
# An epoch that brings the model nearer by less than this part is the last.
_LEAST_GAIN = 0.01
# After an epoch that brings it no nearer, the next one starts again at this part of the
# rate.
_LOWERED = 1 / 3
# Of the gain of the best rate tried, what a lower one must have to be taken instead.
_ENOUGH = 0.75
# A step changes a gain by this part of what it changes a map by, both relative.
_GAIN_RATE = 0.02
#: Learning rates that are tried where none is given, each on so many windows; as many
#: give the spread of what the maps read.
RATES, FEW_WINDOWS = (0.03, 0.1, 0.3), 12


class Distillation:
    """
    Distillation of a model into the same model with layers replaced.

    :param forward: the model
    :param architecture: its family
    :param windows: to train on
    :param trials: on windows that are neither trained nor fitted on
    """

    def __init__(
        self,
        forward: PartialForward,
        architecture: Architecture,
        windows: Windows,
        trials: Trials,
    ) -> None:
        self._forward = forward
        self._architecture = architecture
        self._windows = windows.one_by_one()
        self._trials = trials
        self._original = OriginalLogits(forward, self._windows)
        self._undone: Callable[[], AbstractContextManager[None]] = nullcontext
        self._generator = torch.Generator()

    def run(
        self, replacements: Mapping[int, Replacement], epochs: int, rate: float | None
    ) -> tuple[dict[int, Replacement], Trial]:
        """
        Return the trained replacements, and how they do on the held-out windows.

        Muon, one window a step. Steps are in proportion to each map's own spread: the
        first step moves an output by at most ``rate`` times its standard deviation, on
        an input as large as inputs are. What sets its size is no gradient, so a few
        massive tokens do not.

        The trained gains are put into the model, which is as it was if this fails.

        :param replacements: with weights, by decoder layer index
        :param epochs: passes over the windows, >= 1
        :param rate: learning rate, dimensionless; None: the one of a few that brings
            the model nearest to the original in a few steps
        """
        layers, architecture = self._forward.layers, self._architecture
        kept, best = dict(replacements), self._trials.together(replacements)
        before, kept_gains = best.kl, dict[nn.Module, Tensor]()
        for number in range(len(self._windows.batches)):
            self._original.run(number)  # while the gains are the original's
        with self._frozen(), replaced(layers, architecture, replacements) as undone:
            self._undone = undone
            inputs = self._inputs(replacements)
            if rate is None:
                rate = self._find_rate(replacements, inputs, before)
            maps, gains = _maps(replacements, inputs), self._gains(min(replacements))
            for epoch in range(epochs):
                # Each epoch anneals: what is measured at its end is at rest.
                self._train(maps, gains, rate, self._shuffled(epoch))
                trained = {i: each.replacement() for i, each in maps.items()}
                trial = self._try(trained, gains)
                gained = best.kl - trial.kl
                logger.info(
                    "NBL: distillation, epoch {} of at most {}: divergence from the "
                    "original model {:.5f} on held-out windows, {:.5f} before",
                    epoch + 1,
                    epochs,
                    trial.kl,
                    before,
                )
                if not gained > 0:  # so, too, if it is not a number
                    maps, rate = _maps(kept, inputs), rate * _LOWERED
                    for gain in gains:
                        gain.restart(kept_gains.get(gain.norm))
                    continue
                kept, best = trained, trial
                kept_gains = {gain.norm: gain.stored().detach() for gain in gains}
                if gained < _LEAST_GAIN * before:
                    break
        if best.kl == before:
            logger.warning(
                "NBL: distillation brought the model no nearer to the original on "
                "held-out windows, so the maps stay as they were fitted. Use a lower "
                "distill_rate than {:g}, or more calibration samples.",
                rate / _LOWERED,
            )
        for norm, values in kept_gains.items():
            update_offload_parameter(norm, "weight", values)
        return kept, best

    def _find_rate(
        self, replacements: Mapping[int, Replacement], inputs: _Inputs, before: float
    ) -> float:
        """Return a rate for all windows, by what brings the model near in a few."""
        numbers = self._shuffled(0)[:FEW_WINDOWS]
        found = dict[float, float]()
        for rate in RATES:
            maps, gains = _maps(replacements, inputs), self._gains(min(replacements))
            self._train(maps, gains, rate, numbers)
            trained = {i: each.replacement() for i, each in maps.items()}
            trial = self._try(trained, gains)
            found[rate] = trial.kl if math.isfinite(trial.kl) else math.inf
        gained = {rate: before - kl for rate, kl in found.items()}
        enough = _ENOUGH * max(gained.values())
        best = min((rate for rate in RATES if gained[rate] >= enough), default=RATES[0])
        # A few windows bear a higher rate than many do: steps in random directions add
        # up like the root of their number.
        best *= math.sqrt(len(numbers) / len(self._windows.batches))
        best = float(f"{best:.2g}")  # what is logged is what it takes to do it again
        logger.info(
            "NBL: distill_rate {:g} for {} windows, by the divergences after {} "
            "({}; {:.5f} before)",
            best,
            len(self._windows.batches),
            len(numbers),
            ", ".join(f"{rate:g}: {kl:.5f}" for rate, kl in sorted(found.items())),
            before,
        )
        return best

    def _try(
        self, trained: Mapping[int, Replacement], gains: Sequence[_TrainedGain]
    ) -> Trial:
        with self._undone(), _using(gains):
            return self._trials.together(trained)

    def _gains(self, start: int) -> list[_TrainedGain]:
        """Return those of the norms from a decoder layer on; the head's stays."""
        return [
            _TrainedGain(module)
            for layer in self._forward.layers[start:]
            for module in layer.modules()
            if type(module).__name__.endswith("Norm")
            and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
            and weight.ndim == 1
        ]

    def _shuffled(self, epoch: int) -> list[int]:
        """Return the numbers of the windows, in the order of an epoch in any run."""
        self._generator.manual_seed(epoch)
        count = len(self._windows.batches)
        return torch.randperm(count, generator=self._generator).tolist()

    def _train(
        self,
        maps: Mapping[int, _TrainedMap],
        gains: Sequence[_TrainedGain],
        rate: float,
        numbers: Sequence[int],
    ) -> None:
        """Take a step on each window, in the order of ``numbers``."""
        trained = [each for m in maps.values() for each in m.trained(rate)]
        trained += [gain.trained(rate) for gain in gains]
        dtypes = {each.dtype for each in maps.values()}
        half = dtypes == {torch.bfloat16}
        optimizer = Muon(
            trained, len(numbers), torch.bfloat16 if half else torch.float32
        )
        with self._running(maps), FastProducts():
            for number in numbers:
                targets = target_tokens(self._windows, number)
                count = sum(len(target.positions) for target in targets)
                if count > 0:
                    with self._undone():
                        original = self._original.of(number)
                    batch, start = self._windows.batches[number], min(maps)
                    with torch.enable_grad(), _using(gains):
                        logits = self._forward.differentiable_logits(batch, start)
                        (divergence(targets, logits, original) / count).backward()
                optimizer.step()

    def _inputs(self, replacements: Mapping[int, Replacement]) -> _Inputs:
        """Return mean and spread of what each map reads in the linearized model."""
        sums = {index: _ChannelSums() for index in replacements}
        with ExitStack() as stack:
            for index, each in sums.items():
                hook = self._linear(index).register_forward_pre_hook(each.hook)
                stack.callback(hook.remove)
            for number in self._shuffled(0)[:FEW_WINDOWS]:
                for each in sums.values():
                    each.counted = self._windows.targets(number)
                batch = self._windows.batches[number]
                self._forward.hidden_states(batch, max(replacements) + 1)
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
    def _running(self, maps: Mapping[int, _TrainedMap]) -> Iterator[None]:
        with ExitStack() as stack:
            for index, each in maps.items():
                stack.enter_context(calling(self._linear(index), each))
            yield

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Ask for no gradient of the model's own weights while the context lasts."""
        weights = [w for w in self._forward.parameters() if w.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)


# Mean and standard deviation of each channel, by decoder layer index.
_Inputs = dict[int, tuple[Tensor, Tensor]]


class _TrainedMap:
    """
    A map with weights to train, in float32, for x centred and of unit variance.

    Otherwise channels that are large, or far from zero, would take all of a step.

    :param replacement: where to start
    :param mean: of each channel of x, ``[d_in]``, float64
    :param spread: standard deviation of each channel, ``[d_in]``, float64
    """

    def __init__(self, replacement: Replacement, mean: Tensor, spread: Tensor) -> None:
        assert replacement.weight is not None
        assert replacement.bias is not None
        self._start = replacement
        device = mean.device
        self.dtype = replacement.weight.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        least = _LEAST_SPREAD * float(spread.square().mean().sqrt())
        self._mean = mean.to(wide)
        self._spread = spread.clamp_min(least or 1.0).to(wide)

        def parameter(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.to(device, wide, copy=True))

        reduce, self._expand = replacement.reduce, None
        if reduce is None:
            inner = replacement.weight
        else:
            inner, self._expand = reduce, parameter(replacement.weight)
        self._inner = parameter(inner.to(device, wide) * self._spread)
        shift = self._inner @ (self._mean / self._spread)
        if self._expand is not None:
            shift = self._expand @ shift
        self._bias = parameter(replacement.bias.to(device, wide) + shift)

    def trained(self, rate: float) -> list[Trained]:
        """
        Return the parameters and their steps.

        :param rate: by how much a step may change an output, over its spread
        """
        d_in = len(self._mean)
        features = float(self._inner.detach().square().sum(1).mean().sqrt())
        steps = [Trained(self._inner, rate * features / math.sqrt(d_in))]
        outputs = features
        if self._expand is not None:
            d_out, rank = self._expand.shape
            steps.append(Trained(self._expand, rate / math.sqrt(d_out)))
            outputs = features * math.sqrt(rank / d_out)
        steps.append(Trained(self._bias, rate * outputs / math.sqrt(4 * d_in)))
        return steps

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the checkpoint's weights, rounded as they will be, make of x."""
        weight, bias, reduce = self._stored()
        return linear(x if reduce is None else linear(x, reduce), weight, bias)

    def replacement(self) -> Replacement:
        """Return the replacement as it is now, on the CPU."""
        weight, bias, reduce = (
            None if each is None else each.detach().cpu() for each in self._stored()
        )
        return replace(self._start, weight=weight, bias=bias, reduce=reduce)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Return weight, bias and ``reduce`` as of :class:`Replacement`.

        The bias is that of the rounded weights: a large mean times their rounding
        errors would shift every output, another way at each step.
        """
        dtype, wide = self.dtype, self._bias.dtype
        inner = (self._inner / self._spread).to(dtype)
        shift = inner.to(wide) @ self._mean
        if self._expand is None:
            weight, reduce = inner, None
        else:
            weight, reduce = self._expand.to(dtype), inner
            shift = weight.to(wide) @ shift
        return weight, (self._bias - shift).to(dtype), reduce


class _TrainedGain:
    """
    The gains of a norm, to be trained in float32.

    :param norm: with a weight ``[d]``
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self._start = norm.get_parameter("weight").detach()
        wide = torch.promote_types(self._start.dtype, torch.float32)
        self._parameter = nn.Parameter(self._start.to(wide, copy=True))
        # Of some families a weight of zero is a gain of one.
        ones = torch.ones_like(self._start)
        with _shadowed(norm, torch.zeros_like(ones)), torch.no_grad():
            neutral = float(norm(ones).norm()) > 0
        gains = self._parameter.detach() + float(neutral)
        self._size = float(gains.abs().mean())

    def restart(self, values: Tensor | None) -> None:
        """Go on from ``values``, ``[d]``; None: from where it started."""
        self._parameter.data.copy_(self._start if values is None else values)

    def trained(self, rate: float) -> Trained:
        """Return the parameter and its step; ``rate`` is the maps'."""
        return Trained(self._parameter, _GAIN_RATE * rate * self._size)

    def stored(self) -> Tensor:
        """Return what the checkpoint will hold, ``[d]``, in the model's dtype."""
        return self._parameter.to(self._start.dtype)


@contextmanager
def _using(gains: Sequence[_TrainedGain]) -> Iterator[None]:
    """Let norms compute with trained gains, differentiable in them."""
    with ExitStack() as stack:
        for gain in gains:
            stack.enter_context(_shadowed(gain.norm, gain.stored()))
        yield


@contextmanager
def _shadowed(norm: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let a norm see another weight, wherever its own may be."""
    # an attribute comes before a parameter of that name
    vars(norm)["weight"] = weight
    try:
        yield
    finally:
        del vars(norm)["weight"]


class _ChannelSums:
    """Mean and standard deviation of each channel of what a module is called with."""

    def __init__(self) -> None:
        self.counted = torch.ones(0, dtype=torch.bool)
        self._count = 0
        self._sums: Tensor | None = None

    def hook(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add a batch, ``[batch, tokens, d]``, of which the counted tokens."""
        x = args[0][self.counted.to(args[0].device)].double()
        sums = torch.stack((x.sum(0), x.square().sum(0)))
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(x)

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """Return both, ``[d]``, float64."""
        assert self._sums is not None
        mean, square = self._sums / self._count
        return mean, (square - mean.square()).clamp_min(0.0).sqrt()


def _maps(
    replacements: Mapping[int, Replacement], inputs: _Inputs
) -> dict[int, _TrainedMap]:
    """Return what is trained, by decoder layer index."""
    return {
        index: _TrainedMap(replacement, *inputs[index])
        for index, replacement in replacements.items()
    }
