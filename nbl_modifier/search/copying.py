# SPDX-License-Identifier: Apache-2.0
"""
Windows that say their first half again.

What comes again a model predicts by copying from its context, which few of its layers
do ("induction heads", Olsson et al. 2022, arXiv:2209.11895). Ordinary text hardly asks
for that, so what is measured on it hardly changes when these layers go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from loguru import logger

from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.windows import Batch, Windows

__all__ = ["num_repeating", "partly_repeating", "repeating"]

# One in so many windows: of those that trials are on, and of those to train on.
_TRIED, _TRAINED = 2, 4
# What a window may consist of to be put together anew: all is by token, none by place.
_BY_TOKEN = {"input_ids", "attention_mask", "labels", "loss_mask"}


def num_repeating(held_out: int) -> int:
    """
    Return how many windows :func:`repeating` returns, if all can repeat.

    :param held_out: how many it gets
    """
    return math.ceil(held_out / _TRIED)


def repeating(windows: Windows) -> Windows:
    """
    Return every second window with its first half in place of its second.

    Only tokens of the second half are to be predicted. Padding is left out, and so are
    windows that consist of more than tokens and masks, of images for example.

    :param windows: of this process; numbers go on from one process to the next
    """
    found = [again for _, again in _pairs(windows, _TRIED) if again is not None]
    if not any(Ranks().gather(bool(found))):
        logger.warning(
            "NBLModifier.copying: no held-out window is of tokens and masks alone, so "
            "what the model copies from its context is not measured."
        )
    return _together(found, windows)


def partly_repeating(windows: Windows) -> Windows:
    """
    Return all windows, one by one, every fourth as :func:`repeating` makes it.

    :param windows: of this process; numbers go on from one process to the next
    """
    parts = [again or one for one, again in _pairs(windows, _TRAINED)]
    return _together(parts, windows)


def _pairs(windows: Windows, every: int) -> Iterator[tuple[Windows, Windows | None]]:
    """Yield each window, and what it is if it repeats; None: it does not."""
    single, ranks = windows.one_by_one(), Ranks()
    count = len(single.batches)
    before = sum(ranks.gather(count)[: ranks.rank])
    for number in range(count):
        window = single.select([number])
        wanted = (before + number) % every == 0
        yield window, _again(window) if wanted else None


def _again(window: Windows) -> Windows | None:
    (batch,) = window.batches
    tokens = batch["input_ids"]
    if not batch.keys() <= _BY_TOKEN or len(tokens) != 1:
        return None
    mask = batch.get("attention_mask")
    real = torch.ones_like(tokens[0]) if mask is None else mask[0]
    half = real.nonzero().flatten()
    half = half[: len(half) // 2]
    if len(half) == 0:
        return None
    masks = window.loss_masks or [None]
    second = (torch.ones_like(tokens) if masks[0] is None else masks[0])[:, half]
    twice: Batch = {
        name: torch.cat([values[:, half]] * 2, 1) for name, values in batch.items()
    }
    loss_mask = torch.cat([torch.zeros_like(second), second], 1)
    return Windows([twice], [loss_mask], window.placeholder)


def _together(parts: Iterable[Windows], windows: Windows) -> Windows:
    none = Windows([], None, windows.placeholder)
    return reduce(Windows.and_then, parts, none)
