# SPDX-License-Identifier: Apache-2.0
"""Texts and facts of benchmarks/paper_table.py."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from nbl_modifier.evaluation.texts import HUB_TEXTS, hub_texts, is_local, load_texts
from nbl_modifier.evaluation.token_windows import pack

# What a small base model completes right, and what counts as right.
FACTS = {
    "The capital of France is": ("Paris",),
    "The capital of Italy is": ("Rome",),
    "The capital of Japan is": ("Tokyo",),
    "The chemical symbol for gold is": ("Au",),
    "The chemical formula of water is": ("H2O",),
    "The largest planet in our solar system is": ("Jupiter",),
    "The number of days in a week is": ("7", "seven"),
    "The largest ocean on Earth is the": ("Pacific",),
    "The currency of Japan is the": ("yen",),
    "The process by which plants make food is called": ("photosynthesis",),
}
_FACT_TOKENS = 8
# Of a corpus that arrives document by document: as many as 512 tokens each would need.
_HUB_TOKENS_PER_DOCUMENT = 128


@dataclass(frozen=True)
class Texts:
    """
    Token windows; no document is both calibrated on and measured.

    :param calibration: to calibrate on
    :param heldout: to measure on, by name; the calibration text's own first
    """

    calibration: Dataset
    heldout: dict[str, Dataset]


def named_source(argument: str) -> tuple[str, str]:
    """
    Split ``NAME=SOURCE``; a source alone has its last part for a name.

    :param argument: of the command line
    :raises argparse.ArgumentTypeError: if there is neither such a file nor corpus
    """
    name, separator, source = argument.rpartition("=")
    if not is_local(source) and source not in HUB_TEXTS:
        raise argparse.ArgumentTypeError(
            f"{source}: no such file, and none of {', '.join(HUB_TEXTS)} on the hub"
        )
    if not separator:
        name = source.rstrip("/").rpartition("/")[2].partition(".")[0]
    if not re.fullmatch(r"[\w-]+", name):
        raise argparse.ArgumentTypeError(
            f"{name!r}: a name is of letters, digits, - and _; pass NAME={source}"
        )
    return name, source


def load_windows(
    calibration: tuple[str, str],
    others: Iterable[tuple[str, str]],
    tokenizer: Any,
    *,
    samples: int,
    heldout_windows: int,
    seq_len: int,
    seed: int,
) -> Texts:
    """
    Return the windows of all texts.

    :param calibration: name and source; its last documents are held out, and its others
        calibrated on in an order drawn by ``seed``
    :param others: name and source of further held-out texts
    :param tokenizer: the model's
    :param samples: windows to calibrate on
    :param heldout_windows: to measure on, of each text
    :param seq_len: tokens per window
    :param seed: of the order
    :raises ValueError: if a text is too short, or a name is there twice
    """
    name, source = calibration
    needed = (samples + heldout_windows) * seq_len
    documents = list(dict.fromkeys(_documents(source, needed)))
    split = _first_heldout(documents, tokenizer, heldout_windows * seq_len)
    rest = documents[:split]
    random.Random(seed).shuffle(rest)
    heldout = {
        name: _windows(source, documents[split:], tokenizer, seq_len, heldout_windows)
    }
    for other, where in others:
        if other in heldout:
            raise ValueError(f"--text {other}: there are two of that name. Rename one.")
        # windows from everywhere in it, not its beginning
        everything = pack(_documents(where, None), tokenizer, seq_len)
        step = max(1, len(everything) // heldout_windows)
        chosen = everything.select(range(0, len(everything), step))
        if len(chosen) < heldout_windows:
            raise _too_short(where, len(chosen), heldout_windows)
        heldout[other] = chosen.select(range(heldout_windows))
    return Texts(_windows(source, rest, tokenizer, seq_len, samples), heldout)


def digest(windows: Dataset) -> str:
    """
    Return a hash of token windows.

    :param windows: rows with ``input_ids``
    """
    return hashlib.sha256(repr(windows["input_ids"][:]).encode()).hexdigest()


@torch.no_grad()
def facts_completed(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """
    Return greedy completions of ``FACTS``, and whether each has a right answer.

    :param model: on any device
    :param tokenizer: the model's
    """
    completed = {}
    for prompt, answers in FACTS.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        start = ids.shape[1]
        for _ in range(_FACT_TOKENS):
            # without a cache, which a sliced model does not have; the prompts are short
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        text = tokenizer.decode(ids[0, start:])
        completed[prompt] = {"completion": text, "is_right": is_right(text, answers)}
    return completed


def is_right(completion: str, answers: Iterable[str]) -> bool:
    """
    Return whether one of the answers is a word of the completion.

    :param completion: of a prompt
    :param answers: in any case
    """
    return any(
        re.search(rf"\b{re.escape(answer)}\b", completion, re.IGNORECASE)
        for answer in answers
    )


def hashes(windows: Mapping[str, Dataset]) -> dict[str, str]:
    """
    Return a hash of each text's windows.

    :param windows: by name
    """
    return {name: digest(each) for name, each in windows.items()}


def _documents(source: str, num_tokens: int | None) -> list[str]:
    """Return the documents of a file in their order, or enough of a corpus."""
    if is_local(source):
        return load_texts(source, "heldout")
    if num_tokens is None:
        return list(hub_texts(source, split="test"))
    enough = num_tokens // _HUB_TOKENS_PER_DOCUMENT
    return list(itertools.islice(hub_texts(source), enough))


def _first_heldout(documents: list[str], tokenizer: Any, num_tokens: int) -> int:
    """Return where the last documents begin that have so many tokens together."""
    total = 0
    for index in reversed(range(len(documents))):
        total += len(tokenizer(documents[index], verbose=False)["input_ids"])
        if total >= num_tokens:
            return index
    return 0


def _windows(
    source: str, documents: list[str], tokenizer: Any, seq_len: int, count: int
) -> Dataset:
    windows = pack(documents, tokenizer, seq_len, count) if documents else []
    if len(windows) < count:
        raise _too_short(source, len(windows), count)
    return windows


def _too_short(source: str, found: int, wanted: int) -> ValueError:
    return ValueError(
        f"{source}: has {found} windows where {wanted} are asked for. Pass more text, "
        "or lower --samples, --heldout-windows or --seq-len."
    )
