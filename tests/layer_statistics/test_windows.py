# SPDX-License-Identifier: Apache-2.0
"""Which windows are held out, and which tokens are predicted."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.layer_statistics.windows import (
    CalibrationData,
    Windows,
    held_out_batches,
)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        ([2048] * 256, 32),  # one in eight
        ([256] * 256, 64),  # 16,384 tokens
        ([512] * 64, 16),  # one in four has hardly as many
        ([300] * 16, 4),
        ([300] * 2, 1),
        ([16384] * 8, 1),
        ([5000, 100], 1),
        ([0, 0], 1),
    ],
)
def test_number_of_batches(num_tokens: list[int], expected: int) -> None:
    assert len(held_out_batches(num_tokens)) == expected


@given(st.integers(2, 300), st.integers(1, 16))
def test_spread_evenly(num_batches: int, size: int) -> None:
    held_out = sorted(held_out_batches([size] * num_batches))
    assert 0 < len(held_out) < num_batches
    assert 0 <= held_out[0] <= held_out[-1] < num_batches
    gaps = [b - a for a, b in zip(held_out, held_out[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    # neither end has more than its share
    step = num_batches / len(held_out)
    assert held_out[0] <= step
    assert num_batches - held_out[-1] <= step + 1


def test_one_batch_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="got one batch"):
        held_out_batches([8])


def test_targets_are_tokens_with_a_known_predecessor() -> None:
    tokens = torch.zeros(3, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    loss_mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = {"input_ids": tokens, "attention_mask": mask}
    expected = [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    assert Windows([batch]).targets(0).int().tolist() == expected
    assert mask.tolist()[1] == [0, 0, 1, 1, 1]  # the batch is not changed
    expected[0] = [0, 0, 1, 1, 0]
    assert Windows([batch], [loss_mask]).targets(0).int().tolist() == expected
    with_image = batch | {"input_ids": torch.tensor([[7, 7, 7, 1, 2]] * 3)}
    seen = Windows([with_image], placeholder=7).targets(0).int().tolist()
    assert seen == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    alone = Windows([{"input_ids": tokens}]).targets(0)
    assert alone.int().tolist() == [[0, 1, 1, 1, 1]] * 3


def test_selection_keeps_masks_with_their_batches() -> None:
    batches = [{"input_ids": torch.full((2, 3), i)} for i in range(4)]
    masks = [torch.full((2, 3), i) for i in range(4)]
    chosen = Windows(batches, masks).select({3, 1})
    assert [int(batch["input_ids"][0, 0]) for batch in chosen.batches] == [1, 3]
    assert chosen.loss_masks == [masks[1], masks[3]]  # the same objects
    assert Windows(batches).select([0]).loss_masks is None


def test_batches_without_a_mask_count_whole() -> None:
    """As llm-compressor's pipelines take them, which ask each batch for its own."""
    tokens = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    batches: list[Mapping[str, torch.Tensor]] = [
        {"input_ids": tokens, "loss_mask": mask},
        {"input_ids": tokens},
    ]
    assert CalibrationData(batches, 4, frozenset()).loss_masks is None
    data = CalibrationData(batches, 4, frozenset(), masks_count=True)
    windows = Windows(data.batches, data.loss_masks)
    expected = [[0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 1, 1]]
    whole = torch.cat([windows.targets(0), windows.targets(1)])
    assert whole.int().tolist() == expected
    single = windows.one_by_one()
    assert [single.targets(i)[0].int().tolist() for i in range(4)] == expected
    assert CalibrationData(batches[1:], 2, frozenset(), True).loss_masks is None


def test_one_by_one() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    batches = [{"input_ids": tokens, "attention_mask": tokens > 0}]
    masks = [torch.tensor([[0, 0, 1], [1, 1, 1]])]
    single = Windows(batches, masks, placeholder=9).one_by_one()
    assert [batch["input_ids"].tolist() for batch in single.batches] == [
        [[0, 1, 2]],
        [[3, 4, 5]],
    ]
    whole = torch.cat([single.targets(0), single.targets(1)])
    assert torch.equal(whole, Windows(batches, masks, placeholder=9).targets(0))
    assert Windows(batches).one_by_one().loss_masks is None
    # pieces of images, as many as there are: no telling which window they are of
    images = {"input_ids": tokens, "pixel_values": torch.zeros(5, 3, 4, 4)}
    (kept,) = Windows([images]).one_by_one().batches
    assert kept["input_ids"].shape == (2, 3)
