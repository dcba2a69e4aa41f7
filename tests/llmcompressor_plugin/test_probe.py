# SPDX-License-Identifier: Apache-2.0
"""Probes run between the modifiers and leave no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.recipe import Recipe
from transformers import LlamaConfig, LlamaForCausalLM

from nbl_modifier.llmcompressor_plugin.probe import with_probes


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    """Return a tiny random Llama that exists on disk, which oneshot needs."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=128,  # one group of W4A16
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return LlamaForCausalLM.from_pretrained(tmp_path / "model")


def quantize(targets: str) -> QuantizationModifier:
    """Return a data-free modifier that rounds weights to 4 bits."""
    return QuantizationModifier(targets=[targets], scheme="W4A16", ignore=["lm_head"])


def test_measures_before_and_after_each_modifier(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    recipe = Recipe.from_modifiers([quantize("Linear")])
    ids = torch.arange(8)[None]
    expected = model(input_ids=ids).logits
    seen: list[Any] = []

    def measure(module: Any) -> float:
        seen.append(module)
        return (module(input_ids=ids).logits - expected).abs().max().item()

    probed, results = with_probes(recipe, measure)
    oneshot(model=model, recipe=probed, output_dir=str(tmp_path / "out"))
    assert list(results) == ["base", "after QuantizationModifier"]
    # attached from the start, without effect before its own epoch
    assert results["base"] == 0
    assert results["after QuantizationModifier"] > 0
    assert seen == [model, model]
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text("utf-8"))
    (stage,) = saved.values()
    (group,) = stage.values()
    assert list(group) == ["QuantizationModifier"]


def test_the_users_recipe_is_left_alone() -> None:
    modifier = quantize("Linear")
    recipe = Recipe.from_modifiers(modifier)
    probed, results = with_probes(recipe, lambda model: 0)
    assert recipe.modifiers == [modifier]
    assert probed.modifiers[1] is modifier
    assert len(probed.modifiers) == 3
    assert probed.stage == recipe.stage
    assert results == {}


def test_equal_modifiers_are_numbered() -> None:
    recipe = Recipe.from_modifiers([quantize("a"), quantize("b")])
    probed, _ = with_probes(recipe, lambda model: 0)
    labels = [getattr(modifier, "label", None) for modifier in probed.modifiers]
    assert labels == [
        "base",
        None,
        "after QuantizationModifier 1",
        None,
        "after QuantizationModifier 2",
    ]
