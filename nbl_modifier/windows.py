"""The calibration windows, and which of them are held out of fitting. torch only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Windows", "held_out_batches"]

Batch = Mapping[str, Tensor]

# What part of the calibration set is held out at least, at most, and as soon as it has
# so many tokens.
_HELD_OUT_PART, _HELD_OUT_MOST, _HELD_OUT_TOKENS = 1 / 8, 1 / 4, 16_384


@dataclass(frozen=True)
class Windows:
    """
    Batches of calibration windows.

    :param batches: what the model is called with: ``input_ids``, ``attention_mask``
        and the like, ``[batch, tokens]``
    :param loss_masks: ``[batch, tokens]``, nonzero where a token counts, for each
        batch, or None
    :param placeholder: token that stands for a piece of an image, never to be
        predicted, or None
    """

    batches: Sequence[Batch]
    loss_masks: Sequence[Tensor] | None = None
    placeholder: int | None = None

    def targets(self, number: int) -> Tensor:
        """
        Return which tokens of a batch are to be predicted, bool ``[batch, tokens]``.

        Neither padding nor what is masked from the loss, nor the first token, nor
        pieces of images.
        """
        batch = self.batches[number]
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(tokens) if mask is None else mask.to(tokens.device)
        counts = mask != 0  # not .bool(), which of a mask that is bool is no copy
        counts[:, 1:] &= counts[:, :-1].clone()
        counts[:, 0] = False
        if self.loss_masks is not None:
            counts &= self.loss_masks[number].to(tokens.device) != 0
        if self.placeholder is not None:
            counts &= tokens != self.placeholder
        return counts

    def select(self, numbers: Collection[int]) -> Windows:
        """Return the batches with these numbers, in order."""
        masks = self.loss_masks
        return Windows(
            [self.batches[number] for number in sorted(numbers)],
            masks and [masks[number] for number in sorted(numbers)],
            self.placeholder,
        )

    def one_by_one(self) -> Windows:
        """
        Return the same windows in batches of one.

        A batch in which not every tensor has a row for each window stays as it is.
        """
        batches: list[Batch] = []
        masks: list[Tensor] = []
        for number, batch in enumerate(self.batches):
            count = len(batch["input_ids"])
            whole = any(len(values) != count for values in batch.values())
            parts = [slice(None)] if whole else [slice(i, i + 1) for i in range(count)]
            for part in parts:
                batches.append({name: values[part] for name, values in batch.items()})
                if self.loss_masks is not None:
                    masks.append(self.loss_masks[number][part])
        return Windows(batches, masks or None, self.placeholder)


def held_out_batches(num_tokens: Sequence[int]) -> frozenset[int]:
    """
    Return the numbers of the batches that are not to be fitted on.

    One in eight, or, if these have fewer than 16,384 tokens, up to one in four: losses
    of layers differ by thousandths, which fewer tokens do not resolve. They are spread
    evenly: loaders that pad sort their windows by length, so those at one end would be
    unlike the others.

    :param num_tokens: tokens of each batch
    :raises ValueError: if there is one batch only
    """
    num_batches = len(num_tokens)
    if num_batches < 2:
        raise ValueError(
            "calibration set: a part of it is held out to measure errors and losses "
            "on, in whole batches, got one batch. Use more calibration samples or a "
            "smaller batch_size."
        )
    wanted = _HELD_OUT_TOKENS / max(1, sum(num_tokens))
    part = min(max(_HELD_OUT_PART, wanted), _HELD_OUT_MOST)
    count = max(1, math.floor(part * num_batches))
    return frozenset(int((i + 0.5) * num_batches / count) for i in range(count))
