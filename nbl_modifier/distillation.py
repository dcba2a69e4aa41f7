"""
Training the maps, and nothing else, until the whole model predicts as the original did.

A fit, and a refit, weigh every direction of the residual stream alike; what the layers
behind make of an error they cannot know. Here the error that counts is the divergence
of the next-token distributions (Hinton et al. 2015, arXiv:1503.02531), on the same
calibration windows, without labels. The fitted maps are where it starts, and an epoch
that does not help on held-out windows is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .architectures import Architecture
from .forward import PartialForward, calling
from .hf.modeling_nbl import LowRankLinear
from .surgery import Replacement, replaced
from .trials import Target, Trial, Trials, divergence, target_tokens
from .windows import Batch, Windows

__all__ = ["Distillation"]

# The learning rate rises over so many windows, and falls along a cosine to the end.
_WARMUP = 32
# Channels of x that hardly vary are trained as if they varied by this much, times the
# root mean square over channels: their weights could grow without changing any loss.
_LEAST_SPREAD = 1e-2


# The part of the tokens that are exchanged for others of the calibration text, anew in
# each epoch. The original model says what follows in any text; on the same windows over
# and over, maps learn what is particular to them.
_EXCHANGED = 0.1


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
        self._generator = torch.Generator()

    def run(
        self, replacements: Mapping[int, Replacement], epochs: int, rate: float
    ) -> tuple[dict[int, Replacement], Trial]:
        """
        Return the trained replacements, and how they do on the held-out windows.

        Adam, one window a step. Steps are in proportion to each map's own spread, over
        d: whatever the width, the first step of either factor moves an output by about
        ``rate`` times its standard deviation, should all weights push the same way.

        :param replacements: with weights, by decoder layer index
        :param epochs: passes over the windows, >= 1
        :param rate: learning rate, dimensionless
        """
        layers, architecture = self._forward.layers, self._architecture
        kept, best = dict(replacements), self._trials.together(replacements)
        before = best.kl
        with self._frozen(), replaced(layers, architecture, replacements) as undone:
            maps = self._maps(replacements)
            optimizer = torch.optim.Adam(
                [group for each in maps.values() for group in each.groups(rate)],
                betas=(0.9, 0.99),
                eps=1e-15,  # the usual 1e-8 is what gradients of a large model may be
            )
            steps = epochs * len(self._windows.batches)
            self._generator.manual_seed(0)  # the same windows, and noise, in every run
            schedule = LambdaLR(optimizer, lambda step: _schedule(step, steps))
            with tqdm(total=steps, desc="NBL: distilling", leave=False) as bar:
                for epoch in range(epochs):
                    with self._running(maps):
                        for batch, targets in self._epoch():
                            self._step(batch, targets, min(maps), optimizer, undone)
                            schedule.step()
                            bar.update()
                    trained = {i: each.replacement() for i, each in maps.items()}
                    with undone():
                        trial = self._trials.together(trained)
                    if trial.kl < best.kl:  # never so if it is not a number
                        kept, best = trained, trial
                    logger.info(
                        "NBL: distillation, epoch {} of {}: divergence from the "
                        "original model {:.5f} on held-out windows, {:.5f} before",
                        epoch + 1,
                        epochs,
                        trial.kl,
                        before,
                    )
        if best.kl == before:
            logger.warning(
                "NBL: distillation brought the model no nearer to the original on "
                "held-out windows, so the maps stay as they were fitted. Use a lower "
                "distill_rate than {}, or more calibration samples.",
                rate,
            )
        return kept, best

    def _epoch(self) -> Iterator[tuple[Batch, list[Target]]]:
        """Yield every window once, with some of its tokens exchanged."""
        numbers = range(len(self._windows.batches))
        counted = [self._windows.targets(number) for number in numbers]
        tokens = [batch["input_ids"] for batch in self._windows.batches]
        text = torch.cat([each[c] for each, c in zip(tokens, counted, strict=True)])
        for number in torch.randperm(len(numbers), generator=self._generator).tolist():
            where = torch.rand(counted[number].shape, generator=self._generator)
            # Neither padding nor pieces of images.
            exchanged = (where < _EXCHANGED).to(text.device) & counted[number]
            count = (int(exchanged.sum()),)
            drawn = torch.randint(len(text), count, generator=self._generator)
            noisy = tokens[number].masked_scatter(exchanged, text[drawn])
            batch = {**self._windows.batches[number], "input_ids": noisy}
            yield batch, target_tokens(self._windows, number)

    def _step(
        self,
        batch: Batch,
        targets: list[Target],
        start: int,
        optimizer: torch.optim.Optimizer,
        undone: Callable[[], AbstractContextManager[None]],
    ) -> None:
        count = sum(len(target.positions) for target in targets)
        if count == 0:
            return
        with undone():
            original = self._forward.logits(batch)
        logits = self._forward.differentiable_logits(batch, start)
        with torch.enable_grad():
            loss = divergence(targets, logits, original) / count
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()

    def _maps(self, replacements: Mapping[int, Replacement]) -> dict[int, _TrainedMap]:
        """Return what is trained, given what it reads in the linearized model."""
        sums = {index: _ChannelSums() for index in replacements}
        with ExitStack() as stack:
            for index, each in sums.items():
                hook = self._linear(index).register_forward_pre_hook(each.hook)
                stack.callback(hook.remove)
            for number, batch in enumerate(self._windows.batches):
                for each in sums.values():
                    each.counted = self._windows.targets(number)
                self._forward.hidden_states(batch, max(replacements) + 1)
        return {
            index: _TrainedMap(replacements[index], *each.mean_and_spread())
            for index, each in sums.items()
        }

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


class _TrainedMap:
    """
    A map with weights to train, in float32: two factors, the inner one for x centred
    and of unit variance.

    Otherwise channels that are large, or far from zero, would take all of a step. A map
    of full rank is trained as two factors, too, and is one matrix again in the end: it
    comes nearer to the original model in as many steps, and does better on other text.

    :param replacement: where to start
    :param mean: of each channel of x, ``[d_in]``, float64
    :param spread: standard deviation of each channel, ``[d_in]``, float64
    """

    def __init__(self, replacement: Replacement, mean: Tensor, spread: Tensor) -> None:
        assert replacement.weight is not None
        assert replacement.bias is not None
        self._start = replacement
        device = mean.device
        self._dtype = replacement.weight.dtype
        wide = torch.promote_types(self._dtype, torch.float32)
        least = _LEAST_SPREAD * float(spread.square().mean().sqrt())
        self._mean = mean.to(wide)
        self._spread = spread.clamp_min(least or 1.0).to(wide)

        def parameter(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.to(device, wide, copy=True))

        weight, bias, reduce = replacement.weight, replacement.bias, replacement.reduce
        expand = weight.to(device, wide)
        if reduce is None:
            inner, expand = expand * self._spread, torch.eye(len(weight), device=device)
        else:
            inner = reduce.to(device, wide) * self._spread
        self._expand, self._inner = parameter(expand), parameter(inner)
        shift = expand @ (inner @ (self._mean / self._spread))
        self._bias = parameter(bias.to(device, wide) + shift)

    def groups(self, rate: float) -> list[dict[str, object]]:
        """
        Return the parameters and their learning rates, as optimizers take them.

        :param rate: by how much one step may change an output, over its spread
        """
        d_out, rank = self._expand.shape
        d_in = len(self._mean)
        features = float(self._inner.detach().square().sum(1).mean().sqrt())
        outputs = features * math.sqrt(rank / d_out)
        return [
            {"params": [self._expand], "lr": rate / math.sqrt(d_out * rank)},
            {"params": [self._inner], "lr": rate * features / d_in},
            {"params": [self._bias], "lr": rate * outputs / d_in},
        ]

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
        dtype, wide = self._dtype, self._bias.dtype
        expand, inner = self._expand, self._inner / self._spread
        if self._start.reduce is None:
            weight, reduce = (expand @ inner).to(dtype), None
            shift = weight.to(wide) @ self._mean
        else:
            weight, reduce = expand.to(dtype), inner.to(dtype)
            shift = weight.to(wide) @ (reduce.to(wide) @ self._mean)
        return weight, (self._bias - shift).to(dtype), reduce


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


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(_WARMUP, steps))
    return warm * (1 + math.cos(math.pi * step / steps)) / 2
