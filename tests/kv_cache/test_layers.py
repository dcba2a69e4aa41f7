# SPDX-License-Identifier: Apache-2.0
"""What one layer keeps of a sequence, and how many blocks that takes."""

from __future__ import annotations

import pytest

from nbl_modifier.kv_cache import Engine, LayerCache

FULL, SLIDING = LayerCache(4096.0), LayerCache(4096.0, window=1024)
RECURRENT = LayerCache(0.0, state=3e6, num_states=3)


def test_what_is_kept_ends_with_the_window() -> None:
    assert [FULL.size(n) for n in (0, 100, 5000)] == [0, 409_600, 20_480_000]
    assert [SLIDING.size(n) for n in (100, 1024, 5000)] == [409_600, *[4_194_304] * 2]
    assert RECURRENT.size(1) == RECURRENT.size(100_000) == 3e6


@pytest.mark.parametrize(("length", "blocks"), [(1, 1), (16, 1), (17, 2), (1024, 64)])
def test_every_token_is_in_a_block(length: int, blocks: int) -> None:
    assert FULL.blocks(length, 16, Engine()) == blocks


def test_a_window_takes_room_for_what_is_in_flight_and_a_block_more() -> None:
    """vLLM frees blocks behind the window once a step has run, not before."""
    engine = Engine(in_flight=512)
    assert SLIDING.blocks(100_000, 16, engine) == (1023 + 512 + 1) // 16 + 1
    assert SLIDING.blocks(64, 16, engine) == 64 // 16 + 1


def test_a_state_is_one_block_and_more_where_prefixes_are_kept() -> None:
    assert RECURRENT.blocks(100_000, 16, Engine()) == 3
    assert RECURRENT.blocks(100_000, 16, Engine(prefix_caching=False)) == 1


def test_kinds_in_words() -> None:
    assert [each.description for each in (FULL, SLIDING, RECURRENT)] == [
        "full attention",
        "sliding-window attention",
        "recurrent",
    ]
