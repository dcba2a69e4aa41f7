# SPDX-License-Identifier: Apache-2.0
"""What is trained starts as what is stored, and is stored as it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.replacement.surgery import Replacement
from nbl_modifier.search.trained import (
    ChannelSums,
    TrainedGain,
    TrainedMap,
    trained_maps,
    using,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, RANK = 16, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(1, 50, WIDTH) * torch.logspace(-1, 2, WIDTH) + 30.0


def start(rank: int | None, dtype: torch.dtype) -> Replacement:
    spec, bias = LinearizedLayer(rank=rank), normal(WIDTH, seed=1).to(dtype)
    if rank is None:
        return Replacement(spec, (normal(WIDTH, WIDTH, seed=2) / 9).to(dtype), bias)
    expand = (normal(WIDTH, rank, seed=2) / 2).to(dtype)
    return Replacement(spec, expand, bias, (normal(rank, WIDTH, seed=3) / 9).to(dtype))


def sums() -> tuple[Tensor, Tensor]:
    seen = ChannelSums()
    for part in X.split(20, dim=1):
        seen.counted = torch.ones(part.shape[:2], dtype=torch.bool)
        seen.hook(nn.Identity(), (part,))
    return seen.mean_and_spread()


def computed(replacement: Replacement, x: Tensor) -> Tensor:
    assert replacement.weight is not None
    inner = x if replacement.reduce is None else linear(x, replacement.reduce)
    return linear(inner, replacement.weight, replacement.bias)


def test_mean_and_spread_are_those_of_the_tokens_that_count() -> None:
    seen = ChannelSums()
    seen.counted = torch.arange(50)[None] >= 10
    seen.hook(nn.Identity(), (X,))
    mean, spread = seen.mean_and_spread()
    expected = X[0, 10:].double()
    torch.testing.assert_close(mean, expected.mean(0))
    torch.testing.assert_close(spread, expected.std(0, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_replacement_and_is_stored_as_it_computes(
    rank: int | None, dtype: torch.dtype
) -> None:
    given = start(rank, dtype)
    trained = TrainedMap(given, *sums())
    x = X.to(dtype)
    # scaled by the spread and back: a unit in the last place of the dtype, of sums
    atol = 1e-4 if dtype == torch.float32 else 1.0
    torch.testing.assert_close(trained(x), computed(given, x), rtol=0, atol=atol)
    for each in trained.trained(0.1):
        each.parameter.data.add_(normal(*each.parameter.shape, seed=7))
    stored = trained.replacement()
    assert torch.equal(computed(stored, x), trained(x).detach())
    assert not torch.allclose(
        computed(stored, x), computed(given, x), rtol=0, atol=atol
    )
    assert stored.spec is given.spec


def test_maps_have_statistics_of_their_own() -> None:
    given = {1: start(None, torch.float32), 4: start(RANK, torch.float32)}
    maps = trained_maps(given, dict.fromkeys(given, sums()))
    counts = {index: len(each.trained(0.1)) for index, each in maps.items()}
    assert counts == {1: 2, 4: 3}  # weight and bias, and a second weight


def test_gains_are_used_for_so_long_and_can_start_again() -> None:
    norm = nn.RMSNorm(WIDTH)
    norm.weight.data.copy_(1 + normal(WIDTH))
    before = norm(X)
    gain = TrainedGain(norm)
    trained = gain.trained(1.0)
    trained.parameter.data.mul_(2.0)
    with using([gain]):
        torch.testing.assert_close(norm(X), 2 * before)
        norm(X).sum().backward()
    assert trained.parameter.grad is not None
    assert torch.equal(norm(X), before)
    kept = gain.stored().detach().clone()
    gain.restart(None)
    assert torch.equal(gain.stored(), norm.weight)
    gain.restart(kept)
    assert torch.equal(gain.stored(), kept)
