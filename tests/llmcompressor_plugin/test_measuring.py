# SPDX-License-Identifier: Apache-2.0
"""The calibration pass: once over the data, what counts, and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.layer_statistics.moments import LayerStatistics
from tests.llmcompressor_plugin.test_modifier import (
    INPUTS,
    ROUNDED,
    Kind,
    activations,
    assert_map,
    assert_same_weights,
    gptq,
    run,
    weights,
)
from tests.tiny_llama import (
    Model,
    compress,
    demo_tokenizer,
    linearized,
    load,
    ragged_rows,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


LENGTHS = [64, 40, 7, 55, 64, 21, 30, 48, 3, 64, 33, 59, 12, 61, 26, 44]


@INPUTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(llama: Path, side: str, kind: Kind) -> None:
    ragged = ragged_rows(LENGTHS)
    single, _ = run(llama, NBLModifier(num_layers=4, input=kind), ragged)
    batched, report = run(
        llama,
        NBLModifier(num_layers=4, input=kind),
        ragged,
        batch_size=4,
        data_collator="padding",
        # or oneshot cuts the rows to its default of 384 tokens and warns
        max_seq_length=None,
        processor=demo_tokenizer(padding_side=side),
    )
    assert report.num_tokens == sum(LENGTHS)
    expected = weights(single)
    for name, tensor in weights(batched).items():
        # Left padding shifts positions, and rotary angles and activations with them by
        # float32 rounding: 4e-7 in W as measured. Were padding counted, above 1e-2.
        error = torch.linalg.norm(tensor - expected[name])
        assert error <= 5e-6 * torch.linalg.norm(expected[name]), name


def test_tokens_outside_the_loss_do_not_count(llama: Path, rows: Dataset) -> None:
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(16, 64, generator=generator) < 0.6).long().tolist()
    masked = rows.add_column("loss_mask", masks)
    model, report = run(llama, NBLModifier(num_layers=4), masked, use_loss_mask=True)
    assert report.num_tokens == sum(map(sum, masks))
    for index, seen in enumerate(activations(llama, rows, masks)):
        assert_map(model, index, seen.residual, seen.output, ROUNDED)


def count_calls(model: Model) -> list[int]:
    """Return a list that grows by one with each forward pass of the last layer."""
    calls: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("kwargs", "of_gptq"),
    # GPTQ runs every layer twice, to propagate its error, unless it is told not to
    [({}, 2), ({"propagate_error": False}, 1)],
)
def test_nbl_passes_the_data_once(
    llama: Path, rows: Dataset, kwargs: dict[str, Any], of_gptq: int
) -> None:
    model = load(llama)
    calls = count_calls(model)
    compress(model, NBLModifier(num_layers=1), rows, **kwargs)
    assert len(calls) == len(rows)
    model = load(llama)
    calls = count_calls(model)
    compress(model, [NBLModifier(num_layers=1), gptq()], rows, **kwargs)
    assert len(calls) == (1 + of_gptq) * len(rows)


@pytest.mark.parametrize(("pipeline", "peak"), [("independent", 1), ("basic", 4)])
def test_statistics_are_freed_layer_by_layer(
    llama: Path,
    rows: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: str,
    peak: int,
) -> None:
    alive: weakref.WeakSet[LayerStatistics] = weakref.WeakSet()
    counts = []
    original = LayerStatistics.__init__

    def counted(self: LayerStatistics, *args: Any) -> None:
        original(self, *args)
        alive.add(self)
        counts.append(len(alive))

    monkeypatch.setattr(LayerStatistics, "__init__", counted)
    run(llama, NBLModifier(num_layers=2), rows, pipeline=pipeline)
    assert len(counts) == 4  # one per layer, not one per batch
    assert max(counts) == peak
    gc.collect()
    assert not alive


def test_basic_pipeline_gives_the_same_maps(llama: Path, rows: Dataset) -> None:
    expected, _ = run(llama, NBLModifier(num_layers=2), rows)
    model, _ = run(llama, NBLModifier(num_layers=2), rows, pipeline="basic")
    assert_same_weights(model, expected)


def test_no_hooks_stay(llama: Path, rows: Dataset) -> None:
    model, _ = run(llama, NBLModifier(num_layers=2), rows)
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name


def test_same_model_after_a_run_that_failed_in_calibration(
    llama: Path, rows: Dataset
) -> None:
    expected, _ = run(llama, NBLModifier(num_layers=2), rows)
    model = load(llama)
    weight = model.model.layers[2].self_attn.v_proj.weight
    good = weight.detach().clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
        compress(model, NBLModifier(num_layers=2), rows)
    assert linearized(model) == []
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.copy_(good)
    compress(model, NBLModifier(num_layers=2), token_rows())
    assert_same_weights(model, expected)
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
