"""The calibration windows, and which of them are held out of fitting. torch only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Windows", "held_out_batches"]

Batch = Mapping[str, Tensor]

_HELD_OUT_PART = 8  # one of so many windows
_HELD_OUT_MIN = 8  # but so many windows, if that leaves three times as many


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
        counts = torch.ones_like(tokens) if mask is None else mask.to(tokens.device)
        counts = counts.bool()
        counts[:, 1:] &= counts[:, :-1].clone()
        counts[:, 0] = False
        if self.loss_masks is not None:
            counts &= self.loss_masks[number].to(tokens.device) != 0
        if self.placeholder is not None:
            counts &= tokens != self.placeholder
        return counts

    @property
    def num_windows(self) -> int:
        """Windows in all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    def select(self, numbers: Collection[int]) -> Windows:
        """Return the batches with these numbers, in order."""
        masks = self.loss_masks
        return Windows(
            [self.batches[number] for number in sorted(numbers)],
            masks and [masks[number] for number in sorted(numbers)],
            self.placeholder,
        )


def held_out_batches(batch_sizes: Sequence[int]) -> frozenset[int]:
    """
    Return the numbers of the batches that are not to be fitted on.

    They hold about one in eight windows, and at least eight windows or, if there are
    fewer than 32, one in four. They are spread evenly: loaders that pad sort their
    windows by length, so those at one end would be unlike the others.

    :param batch_sizes: windows of each batch
    :raises ValueError: if there is one batch only
    """
    total, num_batches = sum(batch_sizes), len(batch_sizes)
    if num_batches < 2:
        raise ValueError(
            "calibration set: a part of it is held out to measure errors and losses "
            f"on, in whole batches, got one batch of {total} samples. Use more "
            "calibration samples or a smaller batch_size."
        )
    windows = max(total / _HELD_OUT_PART, min(_HELD_OUT_MIN, total / 4))
    count = min(max(1, math.ceil(windows * num_batches / total)), num_batches - 1)
    return frozenset(int((i + 0.5) * num_batches / count) for i in range(count))
