# SPDX-License-Identifier: Apache-2.0
"""Moments as tensors and strings: what is stored of which, and what is not."""

from typing import Any

import pytest
import torch

from nbl_modifier.layer_statistics.packing import (
    pack_moments,
    pack_windows,
    unpack_moments,
    unpack_windows,
)
from tests.layer_statistics.test_store import WIDTH, assert_same, moments


@pytest.mark.parametrize("normalized", [False, True])
def test_parts_lie_beside_each_other(normalized: bool) -> None:
    parts = {"fit": moments(0, normalized), "heldout": moments(1, normalized)}
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for part, each in parts.items():
        more, said = pack_moments(part, each)
        tensors |= more
        metadata |= said
    for part, each in parts.items():
        back = unpack_moments(part, tensors, metadata)
        assert back is not None
        assert_same(back.residual, each.residual)
        assert_same(back.normalized, each.normalized)
        assert back.cosine_distance == each.cosine_distance
    assert unpack_moments("other", tensors, metadata) is None


def test_one_triangle_of_symmetric_matrices_is_stored() -> None:
    tensors, _ = pack_moments("fit", moments(0, normalized=False))
    assert tensors["fit.residual.cov_xx"].numel() == WIDTH * (WIDTH + 1) // 2
    assert tensors["fit.residual.cov_yx"].numel() == WIDTH**2


def test_windows_come_back_in_their_order() -> None:
    """Also beyond ten, where names are no longer in it."""
    windows: list[dict[str, Any]]
    windows = [{"input_ids": torch.full((1, 3), i), "count": i} for i in range(12)]
    packed = pack_windows(windows)
    found = unpack_windows(dict(sorted(packed.items())))
    assert [int(each["input_ids"][0, 0]) for each in found] == list(range(12))
    assert {tuple(each) for each in found} == {("input_ids",)}


@pytest.mark.parametrize(
    "tensors",
    [
        {"1.input_ids": torch.ones(1, 3)},
        {"0.input_ids": torch.ones(3)},
        {"0.attention_mask": torch.ones(1, 3)},
    ],
)
def test_what_is_no_window_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="it holds"):
        unpack_windows(tensors)
