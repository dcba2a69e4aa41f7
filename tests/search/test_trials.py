# SPDX-License-Identifier: Apache-2.0
"""Losses on held-out windows are those of the replaced model, which stays as it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.records.compression import NBLReport
from tests.search.runs import FITTED, HELD_OUT, layer, mean_nll, run
from tests.tiny_llama import (
    Model,
    compress,
    demo_tokenizer,
    load,
    ragged_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loss_is_that_of_the_single_replacement(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    """Layer by layer: replace it alone, and compare held-out text."""
    heldout = rows.select(HELD_OUT)
    base = mean_nll(load(llama), heldout)
    assert everything.heldout is not None
    assert everything.heldout.num_windows == 4
    assert everything.heldout.num_tokens == 4 * 63
    # float32 logits: 1e-7 of a mean of about 6
    assert math.log(everything.heldout.base) == pytest.approx(base, abs=2e-6)
    for index in range(4):
        model, _ = run(llama, rows.select(FITTED), layers=[index])
        measured = layer(everything, index)
        assert measured.loss == pytest.approx(mean_nll(model, heldout) - base, abs=2e-6)
        assert measured.score == measured.loss
    ranking = [result.loss for result in everything.ranking]
    assert ranking == sorted(ranking, key=lambda loss: (loss is None, loss))
    everywhere, _ = run(llama, rows.select(FITTED), num_layers=4)
    assert math.log(everything.heldout.replaced) == pytest.approx(
        mean_nll(everywhere, heldout), abs=2e-6
    )


def test_divergence_is_from_the_original_predictions(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    _, report = run(llama, rows, criterion="kl", num_layers=2)
    _, copying = run(llama, rows, criterion="kl", num_layers=2, copying=True)
    assert copying.heldout == report.heldout
    assert [result.score for result in report.ranking] == sorted(
        result.kl or 0.0 for result in report.layers
    )

    plain = torch.tensor(rows.select(HELD_OUT)["input_ids"])
    again = plain[::2, :32].repeat(1, 2)

    def predictions(model: Model, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, :-1]
        return logits.double().log_softmax(-1)

    def divergences(model: Model, tokens: torch.Tensor) -> torch.Tensor:
        original = predictions(load(llama), tokens)
        replaced = predictions(model, tokens)
        return (original.exp() * (original - replaced)).sum(-1)

    for index in range(4):
        model, _ = run(llama, rows.select(FITTED), layers=[index])
        divergence = divergences(model, plain)
        result = layer(report, index)
        # of float32 logits, with a mean of about 0.1
        assert result.kl == pytest.approx(float(divergence.mean()), abs=2e-6)
        assert result.kl == layer(everything, index).kl
        assert result.loss == layer(everything, index).loss
        said_again = divergences(model, again)[:, 31:]
        both = torch.cat([divergence.flatten(), said_again.flatten()]).mean()
        assert layer(copying, index).kl == pytest.approx(float(both), abs=2e-6)
        assert layer(copying, index).loss == result.loss


def test_trials_leave_nothing_behind(llama: Path, rows: Dataset) -> None:
    """The layers that are not chosen are the original ones, bit for bit."""
    original = load(llama).state_dict()
    model, report = run(
        llama, rows, criterion="loss", selection="greedy", refit=True, num_layers=1
    )
    (chosen,) = report.selected_layers
    for name, tensor in model.state_dict().items():
        if not name.startswith(
            (f"model.layers.{chosen}.self_attn", f"model.layers.{chosen}.input_")
        ):
            assert torch.equal(tensor, original[name]), name
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in vars(module) or hasattr(
            module, "_original_forward_func"
        ), name
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_predicted(llama: Path, side: str) -> None:
    lengths = [64, 40, 7, 55, 64, 21, 30, 48, 3, 64, 33, 59, 12, 61, 26, 44]
    ragged = ragged_rows(lengths)
    modifier = NBLModifier(criterion="loss", num_layers=1)
    compress(
        load(llama),
        modifier,
        ragged,
        batch_size=4,
        data_collator="padding",
        max_seq_length=None,
        processor=demo_tokenizer(padding_side=side),
    )
    report = modifier.report
    assert report is not None
    assert report.heldout is not None
    # the loader sorts by length, longest first; of four batches the third is held out
    heldout = sorted(range(16), key=lambda number: -lengths[number])[8:12]
    assert report.heldout.num_tokens == sum(lengths[i] for i in heldout) - 4
    expected = mean_nll(load(llama), ragged.select(heldout))
    # left padding shifts positions, and with them float32 rounding
    assert math.log(report.heldout.base) == pytest.approx(expected, abs=1e-5)


def test_tokens_outside_the_loss_are_not_predicted(llama: Path, rows: Dataset) -> None:
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(16, 64, generator=generator) < 0.6).long().tolist()
    masked = rows.add_column("loss_mask", masks)
    modifier = NBLModifier(criterion="loss", num_layers=1)
    compress(load(llama), modifier, masked, use_loss_mask=True)
    report = modifier.report
    assert report is not None
    assert report.heldout is not None
    heldout = [masks[number] for number in HELD_OUT]
    assert report.heldout.num_tokens == sum(sum(mask[1:]) for mask in heldout)
    expected = mean_nll(load(llama), rows.select(HELD_OUT), heldout)
    assert math.log(report.heldout.base) == pytest.approx(expected, abs=2e-6)
