# SPDX-License-Identifier: Apache-2.0
"""What a run switches on is off again after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.pipelines.sequential import pipeline as sequential

from nbl_modifier import NBLModifier
from tests.tiny_llama import compress, load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_mode_and_attention_implementation_come_back(
    llama: Path, rows: Dataset
) -> None:
    model = load(llama).train()
    implementation = model.config._attn_implementation
    compress(model, NBLModifier(num_layers=2), rows)
    assert {module.training for module in model.modules()} == {True}
    assert model.config._attn_implementation == implementation


def test_data_of_later_passes_does_not_depend_on_the_checks(
    llama: Path, rows: Dataset
) -> None:
    """Shuffled loaders draw from torch's generator each time they are iterated."""

    class Draw(Modifier):
        """Notes the generator's next number where its calibration would start."""

        def on_initialize(self, state: State, **kwargs: Any) -> bool:
            drawn.append(torch.random.get_rng_state().sum().item())
            return True

        def on_finalize(self, state: State, **kwargs: Any) -> bool:
            return True

    drawn: list[float] = []
    torch.manual_seed(0)
    recipe = [NBLModifier(num_layers=1), Draw()]
    compress(load(llama), recipe, rows, shuffle_calibration_samples=True)
    torch.manual_seed(0)
    compress(load(llama), Draw(), rows, shuffle_calibration_samples=True)
    assert drawn[0] == drawn[1]


def test_a_search_that_fails_leaves_nothing_switched_on(
    llama: Path, rows: Dataset
) -> None:
    """What its pass needed is put back at once, not when another run begins."""
    model = load(llama)
    configs = [layer.self_attn.config for layer in model.model.layers]
    bar = sequential.tqdm
    modifier = NBLModifier(max_nmse=1e-9)
    with pytest.raises(ValueError, match="no layer fits the budget"):
        compress(model, modifier, rows)
    for layer, config in zip(model.model.layers, configs, strict=True):
        assert layer.self_attn.config is config
    assert sequential.tqdm is bar
