# SPDX-License-Identifier: Apache-2.0
"""What is saved: recipes that replay, models of failed runs as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor.core import State
from llmcompressor.modifiers.gptq import GPTQModifier

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.hf.modeling_nbl import LinearizedAttention
from tests.llmcompressor_plugin.test_modifier import gptq, run
from tests.tiny_llama import (
    FOUR_BITS,
    compress,
    linearized,
    load,
    save_llama,
    tensors_in,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_saved_recipe_replays(rows: Dataset, tmp_path: Path) -> None:
    # W4A16 has groups of 128 weights
    llama = save_llama(tmp_path / "model", num_layers=3, hidden_size=128)
    recipe = [
        NBLModifier(
            num_layers=2,
            targets=["LlamaAttention"],
            ignore=["re:.*layers.0.*"],
            criterion="nmse",
            input="normalized",
            dampening_frac=0.01,
        ),
        GPTQModifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"]),
    ]
    compress(load(llama), recipe, rows, output_dir=str(tmp_path / "first"))
    saved = tmp_path / "first" / "recipe.yaml"
    fields = yaml.safe_load(saved.read_text())["default_stage"]["default_modifiers"]
    assert fields["NBLModifier"] == {
        "num_layers": 2,
        "targets": ["LlamaAttention"],
        "ignore": ["re:.*layers.0.*"],
        "criterion": "nmse",
        "selection": "one_shot",
        "refit": False,
        "distill": {"epochs": 0},
        "copying": False,
        "kind": "attention",
        "method": "linear",
        "input": "normalized",
        "dampening_frac": 0.01,
    }
    compress(load(llama), str(saved), rows, output_dir=str(tmp_path / "second"))
    first, second = (tensors_in(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (tmp_path / "second" / "recipe.yaml").read_text() == saved.read_text()


class Failing(GPTQModifier):
    """A quantizer that fails on the second layer, as an out-of-memory error would."""

    def on_sequential_epoch_end(self, state: State, *args: Any, **kwargs: Any) -> None:
        if isinstance(state.model.model.layers[1].self_attn, LinearizedAttention):
            raise RuntimeError("out of memory")
        super().on_sequential_epoch_end(state, *args, **kwargs)


def failing() -> Failing:
    return Failing(config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"])


def test_model_of_a_failed_run_is_saved_as_what_it_is(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = load(llama)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress(
            model,
            [NBLModifier(layers=[1]), failing()],
            rows,
            output_dir=str(tmp_path / "never"),
        )
    assert list(tmp_path.iterdir()) == []
    for name, packed in (("dense", False), ("quantized", True)):
        model.save_pretrained(tmp_path / name, save_compressed=packed)
        assert (tmp_path / name / "nbl_report.json").exists()
    nbl_modifier.hf.register()
    saved = load(tmp_path / "quantized")
    assert type(saved).__name__ == "NBLLlamaForCausalLM"
    assert linearized(saved) == [1]
    # The scales of layers that GPTQ did not reach are anything; the dense checkpoint
    # holds the weights that quantization began on.
    expected, _ = run(llama, NBLModifier(layers=[1]), rows)
    tensors = tensors_in(tmp_path / "dense")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


def test_next_run_after_a_failed_one(llama: Path, rows: Dataset) -> None:
    failed = load(llama)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress(failed, [NBLModifier(layers=[1]), failing()], rows)
    expected, _ = run(llama, NBLModifier(layers=[0, 2]), rows)
    # The failed run's modifiers were finalized on the way.
    assert failed.config.model_type == "nbl_llama"
    model, report = run(llama, [NBLModifier(layers=[0, 2]), gptq()], rows)
    assert report.selected_layers == [0, 2]
    assert model.config.model_type == "nbl_llama"
    assert linearized(expected) == [0, 2]
    # and the failed model is what it says
    with pytest.raises(ValueError, match="quantized already"):
        compress(failed, NBLModifier(layers=[0]), rows)
