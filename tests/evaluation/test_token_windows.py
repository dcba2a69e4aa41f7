# SPDX-License-Identifier: Apache-2.0
"""Windows are full, and each document starts with BOS once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.evaluation.token_windows import calibration_windows, pack

BOS = 0


class FakeTokenizer:
    """
    One token per character, its code point; with or without a BOS of its own.

    :param adds_bos: whether calling it puts BOS in front
    :param has_bos: whether there is a BOS token at all
    """

    def __init__(self, adds_bos: bool = False, has_bos: bool = True) -> None:
        self.adds_bos = adds_bos
        self.bos_token_id = BOS if has_bos else None

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        ids = [ord(character) for character in text]
        return {"input_ids": [BOS, *ids] if self.adds_bos else ids}


def tokenizer(adds_bos: bool = False, has_bos: bool = True) -> Any:
    """Return a fake that passes for one of transformers'."""
    return FakeTokenizer(adds_bos, has_bos)


def rows(texts: list[str], fake: Any, *args: Any) -> list[list[int]]:
    """Return the ``input_ids`` of the packed windows."""
    return pack(texts, fake, *args)["input_ids"][:]


def test_windows_are_full_and_documents_start_with_bos() -> None:
    packed = pack(["abc", "defg"], tokenizer(), 4)
    a, b, c, d, e, f, _ = map(ord, "abcdefg")
    assert packed["input_ids"][:] == [[BOS, a, b, c], [BOS, d, e, f]]
    assert packed["attention_mask"][:] == [[1] * 4, [1] * 4]


def test_bos_is_not_doubled() -> None:
    texts = ["abc", "defg"]
    assert rows(texts, tokenizer(True), 4) == rows(texts, tokenizer(), 4)


def test_tokenizer_without_bos_gets_none() -> None:
    assert rows(["ab", "cd"], tokenizer(has_bos=False), 2) == [
        [ord("a"), ord("b")],
        [ord("c"), ord("d")],
    ]


def test_num_sequences_is_an_upper_limit_and_stops_reading() -> None:
    def texts() -> Any:
        yield "x" * 20
        raise AssertionError("read further than needed")

    assert len(pack(texts(), tokenizer(), 5, 4)) == 4
    assert len(pack(["x" * 20], tokenizer(), 5, 9)) == 4


@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    seq_length=st.integers(2, 7),
)
def test_packing_loses_only_the_tail(texts: list[str], seq_length: int) -> None:
    # a text that starts with the BOS token has its own
    texts = [text for text in texts if not text.startswith("\0")]
    stream = [token for text in texts for token in (BOS, *map(ord, text))]
    if len(stream) < seq_length:
        with pytest.raises(ValueError, match="not one window"):
            rows(texts, tokenizer(), seq_length)
        return
    windows = rows(texts, tokenizer(), seq_length)
    joined = [token for window in windows for token in window]
    assert joined == stream[: len(stream) // seq_length * seq_length]


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(ValueError, match="has 4 tokens, not one window of 8"):
        rows(["abc"], tokenizer(), 8)


@pytest.mark.parametrize("sizes", [(1, 1), (0, 1), (4, 0), (4, -1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="seq_length >= 2 and num_sequences >= 1"):
        rows(["abcdefgh"], tokenizer(), *sizes)


def test_windows_of_a_single_document_are_drawn() -> None:
    text = "".join(map(chr, range(100, 200)))
    everything = rows([text], tokenizer(), 4)
    drawn = [
        calibration_windows([text], tokenizer(), 4, 5, seed)["input_ids"][:]
        for seed in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    for windows in drawn:
        assert len(windows) == 5
        assert all(window in everything for window in windows)
        assert len({tuple(window) for window in windows}) == 5
    assert len(calibration_windows([text], tokenizer(), 4, 1000)) == len(everything)


def test_several_documents_are_packed_as_they_come() -> None:
    texts = ["abc", "defg", "hij"]
    windows = calibration_windows(iter(texts), tokenizer(), 4, 2, seed=3)
    assert windows["input_ids"][:] == rows(texts, tokenizer(), 4, 2)
