# SPDX-License-Identifier: Apache-2.0
"""Losses and divergences are those of the tokens that count, part by part or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.search.predictions import Sums, divergence, target_tokens
from tests.search.runs import padded_batches

pytestmark = pytest.mark.usefixtures("one_thread")


def two_predictions() -> tuple[Tensor, Tensor]:
    """Return logits of a model and of the original, ``[2, 24, 128]`` in float32."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn((2, 2, 24, 128), generator=generator)
    return first, second


def test_divergence_is_that_of_the_predictions_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 24, 50)
    logits = torch.randn(shape, generator=generator, dtype=torch.float32)
    original = torch.randn(shape, generator=generator)
    logits.requires_grad_(True)
    windows = Windows(padded_batches(1))
    total = divergence(target_tokens(windows, 0), logits, original)
    total.backward()
    plain = logits.detach().clone().requires_grad_(True)
    logs, wanted = plain.log_softmax(-1), original.log_softmax(-1)
    each = kl_div(logs, wanted, log_target=True, reduction="none").sum(-1)
    # the token at t is predicted at t - 1; 5 are padding, and one is the first
    expected = each[0, 5:23].sum() + each[1, 0:23].sum()
    expected.backward()
    torch.testing.assert_close(total, expected)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, plain.grad)


@pytest.mark.parametrize("positions", [512, 7])
def test_sums_are_those_of_each_window(
    monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    at_a_time = "nbl_modifier.numerics.logits.LOGITS_AT_A_TIME"
    monkeypatch.setattr(at_a_time, positions * 128)
    windows = Windows(padded_batches(1))
    logits, original = two_predictions()
    sums, targets = Sums(), target_tokens(windows, 0)
    sums.add(targets, logits, original)
    logs, wanted = logits.double().log_softmax(-1), original.double().log_softmax(-1)
    apart = (wanted.exp() * (wanted - logs)).sum(-1)
    tokens = windows.batches[0]["input_ids"]
    for row, first in enumerate((6, 1)):  # the first token that has one before it
        behind = torch.arange(first, 24) - 1
        nll = -logs[row, behind, tokens[row, first:]].sum()
        # of float32 logarithms, of about 5 each
        assert sums.nll[row] == pytest.approx(float(nll), rel=1e-6)
        kl = apart[row, behind].sum()
        assert sums.kl[row] == pytest.approx(float(kl), rel=1e-5)
    assert sums.counts == [18, 23]
    assert sums.loss().nll_mean == pytest.approx(sum(sums.nll) / 41)
    assert sums.divergence() == pytest.approx(sum(sums.kl) / 41)
    total = float(divergence(targets, logits, original))
    assert total == pytest.approx(sum(sums.kl), rel=1e-5)


def test_joined_sums_are_those_of_all_parts_in_order() -> None:
    parts = [Sums([1.0], [2], [0.5]), Sums([4.0, 2.0], [1, 3], [0.0, 1.0])]
    joined = Sums()
    joined.join(parts)
    assert joined == Sums([1.0, 4.0, 2.0], [2, 1, 3], [0.5, 0.0, 1.0])
