# SPDX-License-Identifier: Apache-2.0
"""Which rows are data, and that a layer's statistics are those of just these rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from nbl_modifier.layer_statistics.moments import (
    LayerStatistics,
    check_causal,
    valid_tokens,
)
from nbl_modifier.numerics import CovarianceStats, NonFiniteError
from tests.numerics import oracle
from tests.tiny_llama import load

NAME = "model.layers.3.self_attn"
WIDTH = 8
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)
PADDINGS = {"none": torch.ones_like(RIGHT), "right": RIGHT, "left": LEFT}


def model_mask(llama: Path, padding: Tensor) -> Any:
    """Return the mask that transformers makes for eager attention."""
    model = load(llama, attn_implementation="eager")
    hidden_states = torch.zeros(*padding.shape, 32)
    return create_causal_mask(
        config=model.config,
        inputs_embeds=hidden_states,
        attention_mask=padding,
        past_key_values=None,
        position_ids=torch.arange(padding.shape[1])[None],
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", ["float", "bool", "bfloat16"])
def test_padding_is_not_data(llama: Path, padding: str, kind: str) -> None:
    mask = model_mask(llama, PADDINGS[padding])
    assert mask is not None
    assert mask.shape == (3, 1, 5, 5)
    if kind == "bool":
        mask = mask == 0
    elif kind == "bfloat16":
        mask = mask.to(torch.bfloat16)
    valid = valid_tokens(torch.zeros(3, 5, WIDTH), mask, None)
    assert valid is not None
    assert torch.equal(valid, PADDINGS[padding].bool())


def test_one_mask_for_a_whole_batch() -> None:
    causal = torch.full((1, 1, 4, 4), -torch.inf).triu(1)
    valid = valid_tokens(torch.zeros(3, 4, WIDTH), causal, None)
    assert valid is not None
    assert valid.shape == (3, 4)
    assert valid.all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_tokens_outside_the_loss_are_not_data(dtype: torch.dtype) -> None:
    hidden_states = torch.zeros(2, 3, WIDTH)
    loss_mask = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    valid = valid_tokens(hidden_states, None, loss_mask)
    assert valid is not None
    assert valid.tolist() == [[False, True, True], [True, False, True]]


def test_padding_and_loss_mask_both_count(llama: Path) -> None:
    loss_mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = model_mask(llama, RIGHT)
    valid = valid_tokens(torch.zeros(3, 5, WIDTH), mask, loss_mask)
    assert valid is not None
    assert torch.equal(valid, (loss_mask * RIGHT).bool())


def test_without_masks_all_is_data() -> None:
    assert valid_tokens(torch.zeros(2, 3, WIDTH), None, None) is None


def attention_of(llama: Path) -> nn.Module:
    return load(llama).model.layers[0].self_attn


def test_eager_attention_without_a_mask_raises(llama: Path) -> None:
    with pytest.raises(RuntimeError, match=NAME) as error:
        check_causal(NAME, attention_of(llama), "eager", None)
    assert "pipeline='basic'" in str(error.value)


def test_other_attention_needs_no_mask(llama: Path) -> None:
    check_causal(NAME, attention_of(llama), "sdpa", None)
    check_causal(NAME, attention_of(llama), "eager", torch.zeros(1, 1, 2, 2))
    bidirectional: Any = attention_of(llama)
    bidirectional.is_causal = False
    check_causal(NAME, bidirectional, "eager", None)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """
    Return (R, norm(R), A, valid) of three batches of different shape.

    Channel means are up to 100 times the spread, as in real residual streams.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in ((2, 40), (1, 70), (3, 25)):
        noise = torch.randn(*shape, WIDTH, generator=generator)
        residual = (noise + torch.linspace(-100, 100, WIDTH)).to(dtype)
        normalized = nn.functional.rms_norm(residual, (WIDTH,))
        mixing = torch.randn(WIDTH, WIDTH, generator=generator)
        output = torch.tanh(noise @ mixing).to(dtype) + 3
        valid = torch.rand(shape, generator=generator) < 0.7
        found.append((residual, normalized, output, valid))
    return found


def rows_of(index: int, data: Sequence[tuple[Tensor, ...]]) -> np.ndarray:
    return torch.cat([batch[index][batch[3]] for batch in data]).double().numpy()


def assert_moments(stats: CovarianceStats, X: np.ndarray, Y: np.ndarray) -> None:
    expected = oracle.moments(X, Y)
    assert stats.num_tokens == len(X)
    for name in ("mean_x", "mean_y", "cov_xx", "cov_yx", "cov_yy"):
        value = getattr(stats, name)
        if value is None:
            continue
        # Sums of 200 float64 products: rounding of the order of 200 * 2^-53 = 2e-14
        # of the largest, the means being removed before products are taken.
        wanted = getattr(expected, name)
        np.testing.assert_allclose(
            value.numpy(), wanted, rtol=0, atol=1e-12 * abs(wanted).max()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalized", [False, True])
def test_statistics_equal_the_batch_computation(
    normalized: bool, dtype: torch.dtype
) -> None:
    data = batches(dtype)
    statistics = LayerStatistics(NAME, WIDTH, normalized, torch.device("cpu"))
    for batch in data:
        statistics.update(*batch)
    R, X, A = (rows_of(index, data) for index in range(3))
    assert statistics.num_tokens == len(R)
    moments = statistics.finalize()
    of_residual, of_normalized = moments.residual, moments.normalized
    assert_moments(of_residual, R, A)
    if of_normalized is None:
        assert not normalized
    else:
        assert_moments(of_normalized, X, A)


def test_masked_rows_have_no_influence() -> None:
    plain = LayerStatistics(NAME, WIDTH, True, torch.device("cpu"))
    poisoned = LayerStatistics(NAME, WIDTH, True, torch.device("cpu"))
    for residual, normalized, output, valid in batches(torch.float32):
        plain.update(residual, normalized, output, valid)
        for values in (residual, normalized, output):
            values[~valid] = torch.nan
        poisoned.update(residual, normalized, output, valid)
    mine, theirs = plain.finalize(), poisoned.finalize()
    assert torch.equal(mine.residual.cov_yx, theirs.residual.cov_yx)
    assert mine.normalized is not None
    assert theirs.normalized is not None
    assert torch.equal(mine.normalized.cov_yx, theirs.normalized.cov_yx)


def test_all_tokens_are_data_without_a_mask() -> None:
    residual, normalized, output, _ = batches(torch.float32)[0]
    everything = torch.ones(residual.shape[:2], dtype=torch.bool)
    masked = LayerStatistics(NAME, WIDTH, True, torch.device("cpu"))
    masked.update(residual, normalized, output, everything)
    plain = LayerStatistics(NAME, WIDTH, True, torch.device("cpu"))
    plain.update(residual, normalized, output, None)
    assert plain.num_tokens == residual.shape[0] * residual.shape[1]
    mine, theirs = plain.finalize(), masked.finalize()
    assert torch.equal(mine.residual.cov_yx, theirs.residual.cov_yx)
    assert mine.normalized is not None
    assert theirs.normalized is not None
    assert torch.equal(mine.normalized.cov_yx, theirs.normalized.cov_yx)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_non_finite_activations_name_the_layer(position: int, value: float) -> None:
    batch: list[Any] = list(batches(torch.float32)[0])
    batch[3] = None
    batch[position][1, 3, 5] = value
    statistics = LayerStatistics(NAME, WIDTH, True, torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=NAME):
        statistics.update(*batch)


def test_too_few_tokens_is_an_error() -> None:
    statistics = LayerStatistics(NAME, WIDTH, False, torch.device("cpu"))
    one = torch.ones(1, 1, WIDTH)
    statistics.update(one, one, one, None)
    with pytest.raises(ValueError, match="2 tokens"):
        statistics.finalize()
