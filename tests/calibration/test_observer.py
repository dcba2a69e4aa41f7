# SPDX-License-Identifier: Apache-2.0
"""Hooks add up what the layer saw, each batch where it belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from datasets import Dataset

from nbl_modifier.calibration.observer import LayerObserver
from nbl_modifier.layer_statistics.moments import HeldoutStatistics, LayerStatistics
from nbl_modifier.numerics import CovarianceStats
from tests.calibration.observed import observed, register, unguarded
from tests.numerics import oracle
from tests.streams import stream
from tests.tiny_llama import decoder_layers

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = 2


def assert_moments(stats: CovarianceStats, X: np.ndarray, Y: np.ndarray) -> None:
    expected = oracle.moments(X, Y)
    assert stats.num_tokens == len(X)
    # activations are of float32, and one is a difference of two
    for name in ("mean_x", "mean_y", "cov_xx", "cov_yx"):
        value, wanted = getattr(stats, name).numpy(), getattr(expected, name)
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("whole", [False, True])
def test_batches_are_summed_up_where_they_belong(
    llama: Path, rows: Dataset, whole: bool
) -> None:
    found, batches = observed(llama), [[row] for row in rows["input_ids"]]
    observer = LayerObserver(found.layers, held_out=(1, 5), whole=whole)
    observer.watch(INDEX, register, found.in_flight, unguarded)
    found.run(batches)
    fitted, apart = observer.take(INDEX)
    assert isinstance(fitted, LayerStatistics)
    assert isinstance(apart, LayerStatistics if whole else HeldoutStatistics)
    assert observer.take(INDEX) == (None, None)  # freed
    fresh = observed(llama).model
    for sums, numbers in ((fitted, {*range(16)} - {1, 5}), (apart, {1, 5})):
        tokens = torch.tensor([batches[number][0] for number in sorted(numbers)])
        before, after = stream(fresh, found.layers.architecture, INDEX, tokens)
        moments = sums.finalize()
        stats = moments if isinstance(moments, CovarianceStats) else moments.residual
        assert_moments(stats, before.numpy(), (after - before).numpy())


@pytest.mark.parametrize("reads", ["residual", "normalized"])
def test_the_target_leads_from_another_stream_to_the_models_own(
    llama: Path, rows: Dataset, reads: Literal["residual", "normalized"]
) -> None:
    found, batches = observed(llama, reads), [[row] for row in rows["input_ids"]]
    generator = torch.Generator().manual_seed(0)
    others = {i: torch.randn(1, 64, 32, generator=generator) for i in range(16)}
    observer = LayerObserver(found.layers, streams=others)
    observer.watch(INDEX, register, found.in_flight, unguarded)
    found.run(batches)
    sums, _ = observer.take(INDEX)
    assert sums is not None
    tokens = torch.tensor([row for (row,) in batches])
    fresh = observed(llama).model
    _, after = stream(fresh, found.layers.architecture, INDEX, tokens)
    other = torch.cat([others[i] for i in range(16)]).flatten(0, 1)
    target = (after - other.double()).numpy()
    moments = sums.finalize()
    assert_moments(moments.residual, other.double().numpy(), target)
    if reads == "normalized":
        norm = decoder_layers(found.model)[INDEX].input_layernorm
        assert moments.normalized is not None
        read = norm(other).detach().double().numpy()
        assert_moments(moments.normalized, read, target)


def test_a_norm_that_ran_on_another_batch_is_refused(llama: Path) -> None:
    found = observed(llama)
    observer = LayerObserver(found.layers)
    observer.watch(INDEX, register, found.in_flight, unguarded)
    layer = decoder_layers(found.model)[INDEX]
    streams, rotation = (
        torch.randn(1, 4, 32),
        (torch.ones(1, 4, 8), torch.zeros(1, 4, 8)),
    )
    found.number = 0
    layer.input_layernorm(streams)
    found.number = 1
    with pytest.raises(RuntimeError, match=r"layers\.2.*norm ran on another batch"):
        layer.self_attn(streams, rotation, attention_mask=None)
