"""
Predictions held against the tokens that came, and against the original model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from nbl_modifier.evaluation.perplexity import PerplexityResult, summarize
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.numerics.logits import positions_at_a_time

__all__ = ["Sums", "Target", "divergence", "target_tokens"]


@dataclass(frozen=True)
class Target:
    """
    The tokens to be predicted in one window of a batch.

    :param row: of the window in the batch
    :param positions: of the tokens in the window, ``[targets]``
    :param tokens: which they are, ``[targets]``
    """

    row: int
    positions: Tensor
    tokens: Tensor

    def chunks(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yield positions that predict, and what they should, ``[targets]``, in parts.

        :param logits: of the batch, ``[batch, tokens, vocabulary]``, on any device
        """
        size = positions_at_a_time(logits.shape[-1])
        for positions, tokens in zip(
            (self.positions - 1).split(size), self.tokens.split(size), strict=True
        ):
            yield positions.to(logits.device), tokens.to(logits.device)


def target_tokens(windows: Windows, number: int) -> list[Target]:
    """
    Return the tokens to be predicted in a batch, for each of its windows.

    :param windows: all of them
    :param number: of the batch
    """
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
class Sums:
    """
    Sums over the tokens of each window.

    :param nll: negative log-likelihoods, in nats
    :param counts: tokens to be predicted
    :param kl: divergences from the original model's predictions, in nats
    :param kl_counts: tokens of these, of more windows than have a loss
    """

    nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_counts: list[int] = field(default_factory=list)

    def add(
        self,
        targets: Iterable[Target],
        logits: Tensor,
        original: Tensor | None = None,
        loss: bool = True,
    ) -> None:
        """
        Add a batch.

        :param targets: its tokens to be predicted
        :param logits: ``[batch, tokens, vocabulary]``
        :param original: the same of the original model; None: not asked for
        :param loss: whether its likelihood counts, not the divergence alone
        """
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
            if loss:
                self.nll.append(nll)
                self.counts.append(len(target.positions))
            self.kl.append(kl)
            self.kl_counts.append(len(target.positions))

    def join(self, parts: Iterable[Sums]) -> None:
        """Become the sums over the windows of all parts, in their order."""
        parts = list(parts)
        self.nll = [value for each in parts for value in each.nll]
        self.counts = [value for each in parts for value in each.counts]
        self.kl = [value for each in parts for value in each.kl]
        self.kl_counts = [value for each in parts for value in each.kl_counts]

    def loss(self) -> PerplexityResult:
        """Return the mean negative log-likelihood."""
        return summarize(self.nll, self.counts)

    def divergence(self) -> float:
        """Return the mean divergence from the original model, in nats per token."""
        return math.fsum(self.kl) / sum(self.kl_counts)


def _total(values: Tensor) -> float:
    return values.sum(dtype=torch.float64).item()
