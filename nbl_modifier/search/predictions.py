"""
Predictions held against the tokens that came, and against the original model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from nbl_modifier.evaluation.perplexity import PerplexityResult, summarize
from nbl_modifier.layer_statistics.windows import Windows

__all__ = ["Sums", "Target", "divergence", "target_tokens"]

# Rows of logits in float32 at a time: of 128,000 tokens each, a quarter of a gigabyte.
_ROWS = 512


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

    def chunks(self) -> Iterable[tuple[Tensor, Tensor]]:
        """
        Return the positions that predict, and what they should, part by part.

        :return: pairs of ``[targets]``, of ``_ROWS`` targets at most
        """
        return zip(
            (self.positions - 1).split(_ROWS), self.tokens.split(_ROWS), strict=True
        )


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
    parts = []
    for target in targets:
        for positions, _ in target.chunks():
            at = positions.to(logits.device)
            of_part = logits[target.row, at], original[target.row, at]
            part: Tensor = _Divergence.apply(*of_part)
            parts.append(part)
    return torch.stack(parts).sum()


class _Divergence(torch.autograd.Function):
    """
    Divergence of predictions from the original ones, ``[tokens, vocabulary]`` each.

    Its gradient, the difference of both distributions, is there when the divergence is:
    kept in the dtype of the logits, no part has to be computed again, or be kept in
    float32, for backward.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, original: Tensor) -> Tensor:
        predicted = logits.float().log_softmax(-1)
        reference = original.float().log_softmax(-1)
        probabilities = reference.exp()
        apart = reference.sub_(predicted)
        summed = torch.dot(probabilities.flatten(), apart.flatten())
        if ctx.needs_input_grad[0]:
            gradient = predicted.exp_().sub_(probabilities)
            ctx.save_for_backward(gradient.to(logits.dtype))
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None


@dataclass
class Sums:
    """
    Sums over the tokens of each window.

    :param nll: negative log-likelihoods, in nats
    :param counts: tokens to be predicted
    :param kl: divergences from the original model's predictions, in nats
    """

    nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(
        self, targets: Iterable[Target], logits: Tensor, original: Tensor | None = None
    ) -> None:
        """
        Add a batch.

        :param targets: its tokens to be predicted
        :param logits: ``[batch, tokens, vocabulary]``
        :param original: the same of the original model; None: not asked for
        """
        for target in targets:
            nll = kl = 0.0
            for positions, tokens in target.chunks():
                at = positions.to(logits.device)
                # a part at a time: in float32 all of them would be the peak in memory
                predicted = logits[target.row, at].float().log_softmax(-1)
                wanted = tokens.to(logits.device)
                nll += _total(nll_loss(predicted, wanted, reduction="none"))
                if original is not None:
                    reference = original[target.row, at].float().log_softmax(-1)
                    kl += _total(
                        kl_div(predicted, reference, reduction="none", log_target=True)
                    )
            self.nll.append(nll)
            self.counts.append(len(target.positions))
            self.kl.append(kl)

    def join(self, parts: Iterable[Sums]) -> None:
        """Become the sums over the windows of all parts, in their order."""
        parts = list(parts)
        self.nll = [value for each in parts for value in each.nll]
        self.counts = [value for each in parts for value in each.counts]
        self.kl = [value for each in parts for value in each.kl]

    def loss(self) -> PerplexityResult:
        """Return the mean negative log-likelihood."""
        return summarize(self.nll, self.counts)

    def divergence(self) -> float:
        """Return the mean divergence from the original model, in nats per token."""
        return math.fsum(self.kl) / sum(self.counts)


def _total(values: Tensor) -> float:
    return values.sum(dtype=torch.float64).item()
