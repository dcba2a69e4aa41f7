# SPDX-License-Identifier: Apache-2.0
"""Windows that say their first half again."""

from __future__ import annotations

import pytest
import torch

from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.search.copying import num_repeating, partly_repeating, repeating

TOKENS = torch.arange(70).reshape(7, 10)


def test_every_second_window_says_its_first_half_again() -> None:
    found = repeating(Windows([{"input_ids": TOKENS[:4]}, {"input_ids": TOKENS[4:]}]))
    assert len(found.batches) == num_repeating(len(TOKENS)) == 4
    for number, batch in enumerate(found.batches):
        half = TOKENS[2 * number, :5]
        assert batch["input_ids"].tolist() == [[*half, *half]]
        assert found.targets(number).nonzero()[:, 1].tolist() == [5, 6, 7, 8, 9]


def test_every_fourth_window_is_exchanged_to_train_on() -> None:
    found = partly_repeating(Windows([{"input_ids": TOKENS}]))
    assert len(found.batches) == len(TOKENS)
    for number, batch in enumerate(found.batches):
        repeats = number % 4 == 0
        window = TOKENS[number].tolist()
        assert batch["input_ids"].tolist() == [window[:5] * 2 if repeats else window]
        assert int(found.targets(number).sum()) == (5 if repeats else 9)


@pytest.mark.parametrize("left", [True, False])
def test_padding_and_masked_tokens_are_left_out(left: bool) -> None:
    tokens, real = TOKENS[:1], torch.ones(1, 10, dtype=torch.long)
    real[:, slice(0, 4) if left else slice(6, 10)] = 0
    loss_mask = torch.ones(1, 10, dtype=torch.long)
    start = 4 if left else 0
    loss_mask[0, start + 1] = 0
    windows = Windows([{"input_ids": tokens, "attention_mask": real}], [loss_mask])
    found = repeating(windows)
    half = list(range(start, start + 3))
    assert found.batches[0]["input_ids"].tolist() == [half * 2]
    assert found.batches[0]["attention_mask"].tolist() == [[1] * 6]
    assert found.targets(0).tolist() == [[False, False, False, True, False, True]]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": TOKENS[:1], "position_ids": TOKENS[:1]},
        {"input_ids": TOKENS[:1], "pixel_values": torch.zeros(3, 4)},
        {"input_ids": TOKENS[:1, :1]},
    ],
    ids=["positions", "images", "one token"],
)
def test_what_cannot_be_said_again_stays(
    batch: dict[str, torch.Tensor], logged: list[str]
) -> None:
    windows = Windows([batch])
    assert repeating(windows).batches == []
    assert "NBLModifier.copying: no held-out window" in logged[-1]
    (kept,) = partly_repeating(windows).batches
    assert all(torch.equal(kept[name], values) for name, values in batch.items())
