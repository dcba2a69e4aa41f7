# SPDX-License-Identifier: Apache-2.0
"""The SliceGPT baseline: uncut it is the model, and it cuts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.slicegpt import slice_model, widest_within
from tests.tiny_llama import Model, load, logits_of, save_llama, token_rows
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32


def batches() -> list[Tensor]:
    return list(torch.tensor(token_rows(8)["input_ids"]).split(4))


@pytest.mark.parametrize("tied", [False, True])
def test_in_another_basis_it_is_the_same_model(tmp_path: Path, tied: bool) -> None:
    model: Model = load(save_llama(tmp_path / "base", tied=tied))
    expected = logits_of(model)
    sliced = slice_model(model, batches(), WIDTH)
    # rotations in float32: sums of 32 products, a dozen times
    torch.testing.assert_close(logits_of(sliced), expected, rtol=0, atol=1e-3)


def test_error_falls_with_width(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "base")
    expected = logits_of(load(folder))
    errors = []
    for width in (16, 24, 28, WIDTH):
        sliced = slice_model(load(folder), batches(), width)
        errors.append(float((logits_of(sliced) - expected).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted(tmp_path: Path, tied: bool) -> None:
    folder = save_llama(tmp_path / "base", tied=tied)
    model: Model = slice_model(load(folder), batches(), 20)
    count = sum(weight.numel() for weight in model.parameters())
    assert widest_within(load(folder), count) == 20
    assert widest_within(load(folder), count - 1) == 19
    with pytest.raises(ValueError, match="no width fits 10 parameters"):
        widest_within(load(folder), 10)


def test_what_it_cannot_slice_is_refused(tmp_path: Path) -> None:
    other = load(save_tiny(tmp_path / "qwen", "qwen3"))
    with pytest.raises(NotImplementedError, match="got Qwen3ForCausalLM"):
        slice_model(other, batches(), 16)
    llama = load(save_llama(tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"\[1, 32\], got 33"):
        slice_model(llama, batches(), 33)
