# SPDX-License-Identifier: Apache-2.0
"""From a map to weights as they are stored, and from attention's weights to a map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbl_modifier import numerics
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.replacement.realize import (
    check_weights_map,
    no_map,
    realize,
    weights_map,
)
from tests.followers import TinyModels
from tests.numerics.cases import gaussian_pair, stats_of
from tests.tiny_llama import decoder_layers, load

pytestmark = pytest.mark.usefixtures("one_thread")

STATS = stats_of(*gaussian_pair(400, 12, 12))
X = torch.from_numpy(gaussian_pair(400, 12, 12)[0])


def made_of(linear_map: numerics.LinearMap) -> torch.Tensor:
    weight, bias = linear_map.cast(torch.float64)
    return X @ weight.mT + bias


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_stored_weights_compute_the_map_behind_the_layers_factor(
    rank: int | None, scale: float
) -> None:
    """Granite goes on to multiply what comes from them."""
    solved = numerics.solve_lmmse(STATS)
    spec = LinearizedLayer(rank=rank)
    linear_map, replacement = realize(spec, solved, STATS, torch.float64, scale)
    assert replacement.weight is not None
    assert replacement.bias is not None
    inner = X if replacement.reduce is None else X @ replacement.reduce.mT
    stored = inner @ replacement.weight.mT + replacement.bias
    # float64 throughout
    torch.testing.assert_close(scale * stored, made_of(linear_map), rtol=0, atol=1e-10)
    assert (replacement.reduce is None) == (rank is None)
    if rank is None:
        assert linear_map is solved
    else:
        assert replacement.weight.shape == (12, rank)
        assert numerics.nmse(STATS, linear_map) > numerics.nmse(STATS, solved)


def test_weights_are_rounded_to_the_models_dtype() -> None:
    solved = numerics.solve_lmmse(STATS)
    _, stored = realize(LinearizedLayer(), solved, STATS, torch.bfloat16)
    assert stored.weight is not None
    assert stored.weight.dtype == torch.bfloat16
    assert torch.equal(stored.weight, solved.cast(torch.bfloat16)[0])


def test_nothing_is_stored_of_what_is_dropped() -> None:
    spec = LinearizedLayer(method="drop")
    linear_map, replacement = realize(spec, no_map(STATS), STATS, torch.float32)
    assert not made_of(linear_map).any()
    assert (replacement.weight, replacement.bias, replacement.reduce) == (None,) * 3


def test_map_in_the_weights_is_attention_of_a_token_to_itself(llama: Path) -> None:
    attention = decoder_layers(load(llama))[1].self_attn
    read = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)  # of the first position
    with torch.no_grad():
        expected = attention(read, (cos, sin), attention_mask=None)[0]
    weight, bias = weights_map(attention).cast(torch.float32)
    torch.testing.assert_close(read @ weight.mT + bias, expected, rtol=0, atol=1e-5)


def test_a_norm_behind_attention_is_refused(tiny_models: TinyModels) -> None:
    attention = decoder_layers(load(tiny_models("gemma2")))[0].self_attn
    check_weights_map("x", attention, ARCHITECTURES["llama"])
    with pytest.raises(NotImplementedError, match=r"x: .*has a norm behind attention"):
        check_weights_map("x", attention, ARCHITECTURES["gemma2"])
