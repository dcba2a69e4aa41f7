# SPDX-License-Identifier: Apache-2.0
"""What one decoder layer keeps of a sequence, and how many blocks vLLM gives it."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Engine", "LayerCache"]


@dataclass(frozen=True)
class Engine:
    """
    What of an engine decides how much memory a sequence gets.

    :param block_size: tokens per block of the KV cache; vLLM's on GPUs, 128 on CPUs
    :param in_flight: tokens that may be scheduled at a time, for which a sliding-window
        layer keeps room besides its window: ``max_num_batched_tokens``, times the
        batches in flight. The default is that of a server on a large GPU
    :param prefix_caching: whether it keeps beginnings of sequences for others to begin
        with, for which a recurrent layer needs more than one state
    """

    block_size: int = 16
    in_flight: int = 8192
    prefix_caching: bool = True


@dataclass(frozen=True)
class LayerCache:
    """
    What one decoder layer keeps of a sequence. Equal ones are of one kind.

    :param bytes_per_token: keys and values of one token, 0 of a recurrent layer
    :param window: tokens that it keeps at most, None: all
    :param state: bytes of a recurrent layer's state, whatever the length
    :param num_states: how many of them it keeps where prefixes are cached
    """

    bytes_per_token: float
    window: int | None = None
    state: float = 0.0
    num_states: int = 1

    @property
    def description(self) -> str:
        """The kind in words."""
        if self.state:
            return "recurrent"
        return "full attention" if self.window is None else "sliding-window attention"

    def size(self, length: int) -> float:
        """
        Return bytes for a sequence, nothing rounded up.

        :param length: its tokens
        """
        kept = length if self.window is None else min(length, self.window)
        return self.state + kept * self.bytes_per_token

    def blocks(self, length: int, block_size: int, engine: Engine) -> int:
        """
        Return how many blocks a sequence takes of vLLM's pool.

        :param length: its tokens
        :param block_size: tokens of this layer in a block
        :param engine: what else decides
        """
        if self.state:
            return self.num_states if engine.prefix_caching else 1
        if self.window is None:
            return math.ceil(length / block_size)
        kept = min(self.window - 1 + engine.in_flight, length)
        return math.ceil(kept / block_size) + 1  # a window begins inside of a block
