"""
Measured losses: what replacements do to the model on held-out windows.

With several processes each runs its own windows. All hear what came of each window, in
the order of their ranks, and add up the same numbers, so they take the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from nbl_modifier.architectures import Architecture
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.evaluation.perplexity import PerplexityResult, summarize
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.numerics.logits import positions_at_a_time
from nbl_modifier.replacement.surgery import Replacement, replaced

__all__ = ["OriginalLogits", "Target", "Trial", "Trials", "divergence", "target_tokens"]


@dataclass(frozen=True)
class Trial:
    """
    The model with something replaced.

    :param loss: negative log-likelihood of the held-out windows
    :param kl: mean Kullback-Leibler divergence of its next-token distribution from the
        original model's, in nats per token
    """

    loss: PerplexityResult
    kl: float


class OriginalLogits:
    """
    What the original model predicts, each window run once.

    The residual stream behind the last layer is kept, on the CPU, and the head computes
    the logits from it again: of a vocabulary they would be hundreds of times as large.

    :param forward: the model; whenever it is asked, with nothing replaced
    :param windows: what it predicts
    """

    def __init__(self, forward: PartialForward, windows: Windows) -> None:
        self._forward = forward
        self._windows = windows
        self._streams: dict[int, Tensor] = {}

    def of(self, number: int) -> Tensor:
        """
        Return the logits of a batch, ``[batch, tokens, vocabulary]``.

        :param number: of the batch
        """
        self.run(number)
        batch, end = self._windows.batches[number], len(self._forward.layers)
        return self._forward.logits(batch, self._streams[number], end)

    def run(self, number: int) -> None:
        """
        Run the original model on a batch, unless it has.

        :param number: of the batch
        """
        if number not in self._streams:
            batch, end = self._windows.batches[number], len(self._forward.layers)
            stream = self._forward.hidden_states(batch, end)
            assert stream is not None
            self._streams[number] = stream.cpu()


class Trials:
    """
    Trials of a model on the same windows, which leave it as it is.

    :param forward: the model
    :param architecture: its family
    :param windows: held out of what the replacements were fitted on; of this process
    """

    def __init__(
        self, forward: PartialForward, architecture: Architecture, windows: Windows
    ) -> None:
        self._forward = forward
        self._architecture = architecture
        self._windows = windows
        self._original = OriginalLogits(forward, windows)
        self._ranks = Ranks()

    def original(self) -> Trial:
        """Return how the original model does; nothing must be replaced."""
        sums = _Sums()
        with self._pooling(sums):
            for number in range(len(self._windows.batches)):
                targets = target_tokens(self._windows, number)
                sums.add(targets, self._original.of(number))
        return sums.trial()

    def loss(
        self, replacements: Mapping[int, Replacement] | None = None
    ) -> PerplexityResult:
        """
        Return the loss of the model.

        :param replacements: put in for the trial, by decoder layer index
        """
        sums = _Sums()
        layers = self._forward.layers
        with (
            self._pooling(sums),
            replaced(layers, self._architecture, replacements or {}),
        ):
            for number, batch in enumerate(self._windows.batches):
                targets = target_tokens(self._windows, number)
                sums.add(targets, self._forward.logits(batch))
        return sums.loss()

    def together(self, replacements: Mapping[int, Replacement]) -> Trial:
        """
        Try all replacements at once.

        :param replacements: by decoder layer index
        """
        sums = _Sums()
        layers = self._forward.layers
        with (
            self._pooling(sums),
            replaced(layers, self._architecture, replacements) as undone,
        ):
            for number, batch in enumerate(self._windows.batches):
                with undone():
                    original = self._original.of(number)
                targets = target_tokens(self._windows, number)
                sums.add(targets, self._forward.logits(batch), original)
        return sums.trial()

    def single(
        self,
        candidates: Mapping[int, Replacement],
        given: Mapping[int, Replacement] | None = None,
    ) -> dict[int, Trial]:
        """
        Try each candidate alone.

        A trial of layer i runs the layers from i on; those before it run once.

        :param candidates: by decoder layer index
        :param given: put in for all of them, by decoder layer index
        """
        sums = {index: _Sums() for index in sorted(candidates)}
        with self._pooling(*sums.values()):
            for number in range(len(self._windows.batches)):
                self._try_on(number, sums, candidates, given or {})
        return {index: sum_.trial() for index, sum_ in sums.items()}

    def _try_on(
        self,
        number: int,
        sums: Mapping[int, _Sums],
        candidates: Mapping[int, Replacement],
        given: Mapping[int, Replacement],
    ) -> None:
        """Try candidates alone on one batch, and add what comes of each to its sums."""
        layers, architecture = self._forward.layers, self._architecture
        batch = self._windows.batches[number]
        targets = target_tokens(self._windows, number)
        original = self._original.of(number)
        stream, start = None, 0
        with replaced(layers, architecture, given):
            for index, sum_ in sums.items():
                stream = self._forward.hidden_states(batch, index, stream, start)
                start = index
                trial = {index: candidates[index]}
                with replaced(layers, architecture, trial):
                    logits = self._forward.logits(batch, stream, start)
                sum_.add(targets, logits, original)

    @contextmanager
    def _pooling(self, *sums: _Sums) -> Iterator[None]:
        """Add this process's windows inside; after it the sums have those of all."""
        with self._ranks.failing_together():
            yield
        found = self._ranks.gather(sums)
        for mine, *parts in zip(sums, *found, strict=True):
            mine.join(parts)


@dataclass(frozen=True)
class Target:
    """The tokens to be predicted in one window of a batch."""

    row: int
    positions: Tensor
    tokens: Tensor

    def chunks(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yield the positions that predict, and what they should, part by part.

        :param logits: of the batch, ``[batch, tokens, vocabulary]``, on any device
        """
        size = positions_at_a_time(logits.shape[-1])
        for positions, tokens in zip(
            (self.positions - 1).split(size), self.tokens.split(size), strict=True
        ):
            yield positions.to(logits.device), tokens.to(logits.device)


def target_tokens(windows: Windows, number: int) -> list[Target]:
    """Return the tokens to be predicted in a batch, for each of its windows."""
    tokens = windows.batches[number]["input_ids"]
    return [
        Target(row, positions, tokens[row, positions])
        for row, counts in enumerate(windows.targets(number))
        for positions in [counts.nonzero().flatten()]
    ]


def divergence(targets: Iterable[Target], logits: Tensor, original: Tensor) -> Tensor:
    """
    Return the summed divergence from the original model, differentiable in ``logits``.

    :param targets: of a batch
    :param logits: ``[batch, tokens, vocabulary]``
    :param original: the same of the original model
    :return: in nats, float32, a scalar
    """
    summed: Tensor = _Divergence.apply(logits, original, targets)
    return summed


class _Divergence(torch.autograd.Function):
    """
    The divergence, with its gradient by the logits.

    The gradient, the difference of both distributions, is there when the divergence is:
    kept in the dtype of the logits, no part has to be computed again, or be kept in
    float32, for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, original: Tensor, targets: Iterable[Target]
    ) -> Tensor:
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        summed = logits.new_zeros((), dtype=torch.float32)
        for target in targets:
            for at, _ in target.chunks(logits):
                predicted = logits[target.row, at].float().log_softmax(-1)
                reference = original[target.row, at].float().log_softmax(-1)
                probabilities = reference.exp()
                apart = reference.sub_(predicted)
                summed += torch.dot(probabilities.flatten(), apart.flatten())
                if gradient is not None:
                    difference = predicted.exp_().sub_(probabilities)
                    gradient[target.row, at] = difference.to(logits.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None, None  # as large as the logits: no copy


@dataclass
class _Sums:
    """Sums over the tokens of each window."""

    nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(
        self, targets: Iterable[Target], logits: Tensor, original: Tensor | None = None
    ) -> None:
        """Add a batch; logits are ``[batch, tokens, vocabulary]``."""
        for target in targets:
            nll = kl = 0.0
            for at, wanted in target.chunks(logits):
                predicted = logits[target.row, at].float().log_softmax(-1)
                nll += _total(nll_loss(predicted, wanted, reduction="none"))
                if original is not None:
                    reference = original[target.row, at].float().log_softmax(-1)
                    kl += _total(
                        kl_div(predicted, reference, reduction="none", log_target=True)
                    )
            self.nll.append(nll)
            self.counts.append(len(target.positions))
            self.kl.append(kl)

    def join(self, parts: Iterable[_Sums]) -> None:
        """Become the sums over the windows of all parts, in their order."""
        parts = list(parts)
        self.nll = [value for each in parts for value in each.nll]
        self.counts = [value for each in parts for value in each.counts]
        self.kl = [value for each in parts for value in each.kl]

    def loss(self) -> PerplexityResult:
        """Return the mean negative log-likelihood."""
        return summarize(self.nll, self.counts)

    def trial(self) -> Trial:
        """Return the means."""
        return Trial(self.loss(), math.fsum(self.kl) / sum(self.counts))


def _total(values: Tensor) -> float:
    return values.sum(dtype=torch.float64).item()
