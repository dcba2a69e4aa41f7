"""
What distillation trains: the maps and the gains of norms, in float32, and how a step of
each is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.replacement.surgery import Replacement

from .muon import Trained

__all__ = [
    "ChannelSums",
    "Inputs",
    "TrainedGain",
    "TrainedMap",
    "trained_gains",
    "trained_maps",
    "using",
]

# Channels of x that hardly vary are trained as if they varied by this much, times the
# root mean square over channels: their weights could grow without changing any loss.
_LEAST_SPREAD = 1e-2
# A step changes a gain by this part of what it changes a map by, both relative.
_GAIN_RATE = 0.02
#: Mean and standard deviation of each channel, by decoder layer index.
Inputs = dict[int, tuple[Tensor, Tensor]]


class TrainedMap:
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
        # A step of spectral norm s moves the outputs by s times the norm of x at most,
        # which is sqrt(d_in); the spread of an output is the norm of its row.
        d_in = len(self._mean)
        features = float(self._inner.detach().square().sum(1).mean().sqrt())
        steps = [Trained(self._inner, rate * features / math.sqrt(d_in))]
        outputs = features
        if self._expand is not None:
            d_out, rank = self._expand.shape
            steps.append(Trained(self._expand, rate / math.sqrt(d_out)))
            outputs = features * math.sqrt(rank / d_out)
        # A bias moves all tokens alike: half as far as a map may move one.
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


class TrainedGain:
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
def using(gains: Sequence[TrainedGain]) -> Iterator[None]:
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


class ChannelSums:
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

    def pool(self, ranks: Ranks, device: torch.device) -> None:
        """
        Add the tokens of all processes.

        :param ranks: the processes
        :param device: where the sums are to be
        """
        if ranks.alone:
            return
        mine = None if self._sums is None else self._sums.cpu()
        parts = ranks.gather((self._count, mine))
        found = [sums for _, sums in parts if sums is not None]
        self._count = sum(count for count, _ in parts)
        self._sums = torch.stack(found).sum(0).to(device)

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """Return both, ``[d]``, float64."""
        assert self._sums is not None
        mean, square = self._sums / self._count
        return mean, (square - mean.square()).clamp_min(0.0).sqrt()


def trained_maps(
    replacements: Mapping[int, Replacement], inputs: Inputs
) -> dict[int, TrainedMap]:
    """
    Return what is trained of the maps, by decoder layer index.

    :param replacements: where to start, with weights, by decoder layer index
    :param inputs: what each of them reads
    """
    return {
        index: TrainedMap(replacement, *inputs[index])
        for index, replacement in replacements.items()
    }


def trained_gains(layers: Iterable[nn.Module]) -> list[TrainedGain]:
    """
    Return what is trained of the norms.

    :param layers: decoder layers, whose norms they are; the head's is none of them
    """
    return [
        TrainedGain(module)
        for layer in layers
        for module in layer.modules()
        if type(module).__name__.endswith("Norm")
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim == 1
    ]
