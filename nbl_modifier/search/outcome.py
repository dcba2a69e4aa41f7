"""What a search found, and what single replacements did on held-out windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbl_modifier.evaluation.perplexity import PerplexityResult
from nbl_modifier.records.compression import HeldoutResult
from nbl_modifier.replacement.surgery import Replacement

from .trials import Trial

__all__ = ["NOT_FINITE", "Effect", "Outcome", "finite"]

#: What helps against losses that are not finite.
NOT_FINITE = (
    "Look for infinite values or NaN in the model's weights, or load it in a dtype "
    "that has the range of its logits, bfloat16 or float32."
)


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


def finite(loss: PerplexityResult, subject: str) -> PerplexityResult:
    """
    Return a loss that can be compared and reported.

    :param loss: on held-out windows
    :param subject: what it is of, for the message
    :raises ValueError: if it is not finite
    """
    if math.isfinite(loss.perplexity):
        return loss
    raise ValueError(
        f"perplexity on held-out windows {subject}: must be finite, got "
        f"{loss.perplexity}. {NOT_FINITE}"
    )
