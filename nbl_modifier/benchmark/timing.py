# SPDX-License-Identifier: Apache-2.0
"""What every engine is asked and answers."""

from __future__ import annotations

import dataclasses
import time

import torch

__all__ = ["Timing", "now", "random_prompts"]


@dataclasses.dataclass(frozen=True)
class Timing:
    """
    One measurement of one cell.

    :param prefill_seconds: from the request to the first token of the last sequence
    :param decode_seconds: of ``decode_steps`` steps, all sequences running
    :param decode_steps: steps that were timed, one token per sequence each
    :param cache_tokens: tokens per sequence in the KV cache, mean over those steps
    :param cache_bytes: bytes of the KV cache per token, measured; None where the engine
        allots it in advance
    """

    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_tokens: float
    cache_bytes: float | None


def now(device: str) -> float:
    """
    Return the time in seconds, once the device has done all that it was given.

    :param device: such as ``cpu`` or ``cuda``
    """
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def random_prompts(
    vocab_size: int, batch: int, context: int, seed: int
) -> list[list[int]]:
    """Return token ids that no other seed's prompts begin with."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, context), generator=generator)
    rows: list[list[int]] = ids.tolist()
    return rows
