"""The calibration windows, which of them are held out, and what of them is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from .processes import Ranks

__all__ = [
    "CalibrationData",
    "Windows",
    "check_calibration_data",
    "check_num_tokens",
    "check_predictable",
    "check_variety",
    "held_out_batches",
    "rewind_generator",
]

Batch = Mapping[str, Tensor]

# Below this many tokens per dimension in-sample scores are visibly optimistic.
_FEW_TOKENS_PER_DIMENSION = 10
# Embeddings compared at a time.
_ROWS = 1024
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
        batch, None for one of which all do; or None
    :param placeholder: token that stands for a piece of an image, never to be
        predicted, or None
    """

    batches: Sequence[Batch]
    loss_masks: Sequence[Tensor | None] | None = None
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
        loss_mask = None if self.loss_masks is None else self.loss_masks[number]
        if loss_mask is not None:
            counts &= loss_mask.to(tokens.device) != 0
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

    def and_then(self, others: Windows) -> Windows:
        """Return these and others."""
        masks: list[Tensor | None] = []
        for each in (self, others):
            masks += each.loss_masks or [None] * len(each.batches)
        batches = [*self.batches, *others.batches]
        return Windows(batches, masks, self.placeholder)

    def one_by_one(self) -> Windows:
        """
        Return the same windows in batches of one.

        A batch in which not every tensor has a row for each window stays as it is.
        """
        batches: list[Batch] = []
        masks: list[Tensor | None] = []
        for number, batch in enumerate(self.batches):
            count = len(batch["input_ids"])
            whole = any(len(values) != count for values in batch.values())
            parts = [slice(None)] if whole else [slice(i, i + 1) for i in range(count)]
            for part in parts:
                batches.append({name: values[part] for name, values in batch.items()})
                if self.loss_masks is not None:
                    mask = self.loss_masks[number]
                    masks.append(None if mask is None else mask[part])
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


@dataclass(frozen=True)
class CalibrationData:
    """
    The calibration set.

    :param batches: in the order in which the pass draws them
    :param num_samples: sequences in all batches, of all processes
    :param held_out: numbers of the batches that are not to be fitted on
    :param masks_count: whether the run uses the masks that came with the batches
    """

    batches: list[Mapping[str, Tensor]]
    num_samples: int
    held_out: frozenset[int]
    masks_count: bool = False

    @property
    def loss_masks(self) -> list[Tensor | None] | None:
        """Those that count, ``[batch, tokens]``, if any; None for a batch without."""
        masks = [batch.get("loss_mask") for batch in self.batches]
        some = any(mask is not None for mask in masks)
        return masks if self.masks_count and some else None


def check_calibration_data(
    batches: Iterable[Any] | None,
    hidden_size: int,
    hold_out: bool = False,
    ranks: Ranks | None = None,
) -> CalibrationData:
    """
    Return what the calibration pass will draw.

    :param batches: the calibration dataloader
    :param hidden_size: d of the model, the dimension of the estimator's input
    :param hold_out: whether a part of the batches is not to be fitted on
    :param ranks: the processes of the run, whose tokens count together, and whose
        batches are held out as if one process had all, in order of their ranks
    :raises ValueError: if there is no data, or not more tokens to fit on than
        ``hidden_size``
    """
    remedy = "Pass dataset=… and num_calibration_samples=… to oneshot()."
    if batches is None:
        raise ValueError(f"NBLModifier needs calibration data, got none. {remedy}")
    ranks = ranks or Ranks()
    # Iterating a shuffled loader draws from torch's generator; without the fork the
    # data of every later pass would depend on this check.
    with ranks.failing_together(), torch.random.fork_rng(devices=[]):
        rewind_generator()  # the samples that the calibration pass will draw
        drawn = list(batches)
        sizes = [len(batch["input_ids"]) for batch in drawn]
        if sum(sizes) == 0:
            raise ValueError(f"the calibration set is empty. {remedy}")
    counts = [_count_tokens(batch) for batch in drawn]
    _check_lengths(max(ranks.gather(max(map(_longest, drawn)))))
    held_out = _own_held_out(counts, ranks) if hold_out else frozenset[int]()
    fitted = (count for i, count in enumerate(counts) if i not in held_out)
    tokens = sum(ranks.gather(sum(fitted)))
    check_num_tokens(
        "part of the calibration set to fit on" if hold_out else "calibration set",
        tokens,
        hidden_size,
    )
    if tokens < _FEW_TOKENS_PER_DIMENSION * hidden_size:
        logger.warning(
            "{} calibration tokens for hidden_size {}: the measured errors will be "
            "optimistic; use {} or more",
            tokens,
            hidden_size,
            _FEW_TOKENS_PER_DIMENSION * hidden_size,
        )
    return CalibrationData(drawn, sum(ranks.gather(sum(sizes))), held_out)


def _own_held_out(counts: Sequence[int], ranks: Ranks) -> frozenset[int]:
    """
    Return which batches of this process are held out: those that one would hold out.

    :param counts: tokens of each batch of this process
    """
    parts = ranks.gather(list(counts))
    before = sum(map(len, parts[: ranks.rank]))
    everywhere = held_out_batches(list(chain.from_iterable(parts)))
    return frozenset(range(len(counts))) & {number - before for number in everywhere}


def _count_tokens(batch: Mapping[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    # Not the sum: a mask may be in a dtype that cannot count so far.
    return batch["input_ids"].numel() if mask is None else int(mask.count_nonzero())


def check_num_tokens(subject: str, num_tokens: int, hidden_size: int) -> None:
    """
    Refuse as many tokens as dimensions or fewer: any data would look exactly linear.

    :param subject: what the tokens are of, for the message
    :raises ValueError: if ``num_tokens <= hidden_size``
    """
    if num_tokens <= hidden_size:
        raise ValueError(
            f"{subject}: {num_tokens} tokens do not determine a map of hidden_size "
            f"{hidden_size}; at least {_FEW_TOKENS_PER_DIMENSION} times as many tokens "
            "as dimensions are advisable. Use more or longer calibration samples."
        )


def _longest(batch: Mapping[str, Tensor]) -> int:
    """Return the tokens of the longest sample of a batch."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch["input_ids"].shape[-1]
    return int(mask.count_nonzero(dim=-1).max()) if len(mask) else 0


def _check_lengths(longest: int) -> None:
    if longest < 2:
        raise ValueError(
            f"calibration set: its samples have at most {longest} token, got no sample "
            "of two. A single token attends to itself alone, so any attention looks "
            "exactly linear. Use longer samples, such as max_seq_length=2048."
        )


def check_predictable(windows: Windows) -> None:
    """
    Refuse held-out windows on which no loss can be measured.

    :param windows: all that are held out, of this process
    :raises ValueError: if there is no token to predict in any of any process
    """
    numbers, ranks = range(len(windows.batches)), Ranks()
    mine = any(bool(windows.targets(number).any()) for number in numbers)
    if not any(ranks.gather(mine)):
        raise ValueError(
            f"held-out part of the calibration set: there is no token to predict in "
            f"its {sum(ranks.gather(len(numbers)))} batches, where losses are to be "
            "measured. Use longer samples, or a loss mask that leaves more of them."
        )


def check_variety(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
    """
    Refuse tokens that are all the same to the model; warn if they are few.

    The input of the first layer is a function of the token alone, so it has no more
    directions than there are tokens of their own.

    :param model: the causal language model
    :param batches: the calibration set
    :raises ValueError: if all tokens have the same embedding
    """
    found = torch.cat([batch["input_ids"].flatten().unique() for batch in batches])
    # of an offloaded weight, access gives the copy on the device that computes
    weight = model.get_input_embeddings().get_parameter("weight")
    tokens = found.unique().to(weight.device)
    tokens = tokens[tokens < len(weight)]  # what stands for an image may be past that
    first = weight[tokens[:1]]
    if any(bool((weight[part] != first).any()) for part in tokens.split(_ROWS)):
        hidden_size = model.config.get_text_config().hidden_size
        if len(tokens) <= hidden_size:
            logger.warning(
                "calibration set: {} different tokens for hidden_size {}, so the maps "
                "of the first layers are not determined by data. Use more varied text.",
                len(tokens),
                hidden_size,
            )
        return
    raise ValueError(
        f"calibration set: the same embedding stands for all of its {len(tokens)} "
        "different tokens, so there is nothing to fit a map to. Use varied text, and "
        "check that the model's embeddings are not all zero."
    )


def rewind_generator() -> Tensor:
    """
    Start torch's CPU generator again from its seed; return its state, uint8 ``[n]``.

    Which samples a shuffled calibration set consists of, and in which order, is drawn
    anew for every pass, from a generator that nobody seeds (llmcompressor 0.14.0.1,
    datasets/utils.py, ``_make_sampler``: ``RandomSampler`` without ``generator``). NBL
    would measure other samples, and linearize other layers, depending on what was drawn
    in the process before. From here on the draws depend on the seed alone: the user's,
    if ``torch.manual_seed`` was called, otherwise torch's own, which is fixed.
    """
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(torch.initial_seed())
    return state
