# SPDX-License-Identifier: Apache-2.0
"""
Text in token windows of one length, as models are calibrated and evaluated on.

`datasets` is imported inside the functions that need it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    num_sequences: int | None = None,
) -> Dataset:
    """
    Tokenize documents, join them and cut the result into windows of full length.

    Each document starts with the tokenizer's BOS token, exactly once, whether or not
    the tokenizer adds it by itself. What does not fill a window at the end is dropped.

    :param texts: documents
    :param tokenizer: the model's tokenizer
    :param seq_length: tokens per window
    :param num_sequences: windows wanted at most; None for all there are
    :return: rows with ``input_ids`` and ``attention_mask`` (all ones), each a list of
        ``seq_length``
    :raises ValueError: if there is not one full window
    """
    from datasets import Dataset

    if seq_length < 2 or (num_sequences is not None and num_sequences < 1):
        raise ValueError(
            "pack needs seq_length >= 2 and num_sequences >= 1, got "
            f"seq_length={seq_length}, num_sequences={num_sequences}."
        )
    tokens: list[int] = []
    wanted = None if num_sequences is None else seq_length * num_sequences
    for document in _tokenize(texts, tokenizer):
        tokens += document
        if wanted is not None and len(tokens) >= wanted:
            break
    count = len(tokens) // seq_length
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, not one window of {seq_length}. Pass "
            "more text or a smaller sequence length."
        )
    count = count if num_sequences is None else min(count, num_sequences)
    windows = [tokens[i * seq_length : (i + 1) * seq_length] for i in range(count)]
    masks = [[1] * seq_length] * count
    return Dataset.from_dict({"input_ids": windows, "attention_mask": masks})


def calibration_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    num_sequences: int,
    seed: int = 0,
) -> Dataset:
    """
    Pack documents that are in random order; of a single one, draw windows.

    :param texts: documents
    :param tokenizer: the model's tokenizer
    :param seq_length: tokens per window
    :param num_sequences: windows wanted at most
    :param seed: which windows of a single document
    :return: rows as from :func:`pack`
    :raises ValueError: if there is not one full window
    """
    documents = iter(texts)
    first = list(itertools.islice(documents, 2))
    if len(first) > 1:
        everything = itertools.chain(first, documents)
        return pack(everything, tokenizer, seq_length, num_sequences)
    windows = pack(first, tokenizer, seq_length)
    count = min(num_sequences, len(windows))
    return windows.select(random.Random(seed).sample(range(len(windows)), count))


def _tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    bos = tokenizer.bos_token_id
    for text in texts:
        # verbose=False: documents longer than the model's context are fine here
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        yield ids
