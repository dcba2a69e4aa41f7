# SPDX-License-Identifier: Apache-2.0
"""Losses that are not finite: a model with one is refused, a layer with one stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from nbl_modifier.records.compression import NBLReport
from tests.search.runs import layer, run
from tests.tiny_llama import (
    Model,
    decoder_layers,
    linearized,
    load,
)

pytestmark = pytest.mark.usefixtures("one_thread")


MEASURED: list[dict[str, Any]] = [
    {"max_perplexity_increase": 0.1},
    {"criterion": "loss", "num_layers": 1},
    {"criterion": "kl", "num_layers": 1},
    {"distill": {"epochs": 1}, "num_layers": 1},
]


@pytest.mark.parametrize("fields", MEASURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_a_finite_loss_is_refused(
    llama: Path, rows: Dataset, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    """An infinite weight, or logits that float16 cannot hold."""
    model = load(llama).to(dtype)
    head = model.get_output_embeddings().weight.data
    if dtype == torch.float16:
        head.mul_(3e4)
    else:
        head[7, 5] = math.inf
    with pytest.raises(ValueError, match="of the model as it is: must be finite"):
        run(llama, rows, model, **fields)
    assert linearized(model) == []


def breaking_at(folder: Path, *indices: int) -> Model:
    """Return a model that gives NaN when attention of these layers is replaced."""
    model = load(folder)
    for index in indices:
        layer = decoder_layers(model)[index]

        def spoil(
            _: Any, args: Any, layer: Any = layer, attention: Any = layer.self_attn
        ) -> Any:
            return args if layer.self_attn is attention else (args[0] * math.nan,)

        layer.mlp.register_forward_pre_hook(spoil)
    return model


@pytest.mark.parametrize("selection", ["one_shot", "greedy"])
@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "loss", "num_layers": 3},
        {"criterion": "kl", "num_layers": 4},
        {"max_perplexity_increase": 1e6},
        {"criterion": "loss", "max_perplexity_increase": 1e6},
    ],
)
def test_a_layer_without_a_finite_trial_is_kept(
    llama: Path, rows: Dataset, fields: dict[str, Any], selection: str
) -> None:
    model, report = run(
        llama, rows, breaking_at(llama, 2), selection=selection, **fields
    )
    assert report.selected_layers == linearized(model) == [0, 1, 3]
    assert "on held-out windows are not finite" in layer(report, 2).reason
    assert NBLReport.from_json(report.to_json()) == report


def test_no_layer_with_a_finite_trial(llama: Path, rows: Dataset) -> None:
    model = breaking_at(llama, 0, 1, 2, 3)
    for fields in ({"criterion": "loss", "num_layers": 1}, MEASURED[0]):
        with pytest.raises(ValueError, match="no layer can be replaced; layer"):
            run(llama, rows, model, **fields)
    with pytest.raises(ValueError, match=r"layers \[.\] replaced: must be finite"):
        run(llama, rows, model, num_layers=1, max_nmse=1e6)
    assert linearized(model) == []
