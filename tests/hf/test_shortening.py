# SPDX-License-Identifier: Apache-2.0
"""Dropped blocks leave a smaller model of the base class, or of the linearized one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
)

import nbl_modifier.hf
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.checkpoint import convert_in_place
from nbl_modifier.hf.configuration_nbl import LinearizedLayer, NBLConfigMixin
from nbl_modifier.hf.modeling_nbl import decoder_layers, linearize_layer
from nbl_modifier.hf.shortening import _shorten_config, renumbered
from tests.tiny_llama import Model, load, logits_of, save_llama

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = ARCHITECTURES["llama"]
DROP = LinearizedLayer(kind="block", method="drop")
NO_ATTENTION = LinearizedLayer(method="drop")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(save_llama(tmp_path / "base", num_layers=6)).eval()


def drop(model: Model, layers: dict[int, LinearizedLayer]) -> Tensor:
    """Drop parts of a model; return its logits before they go for good."""
    for index, spec in layers.items():
        linearize_layer(decoder_layers(model, LLAMA), LLAMA, index, spec, None)
    logits = logits_of(model)
    convert_in_place(model, LLAMA, layers)
    return logits


def test_indices_move_up() -> None:
    layers = {0: DROP, 2: NO_ATTENTION, 3: DROP, 5: LinearizedLayer("normalized")}
    assert renumbered(layers) == {1: NO_ATTENTION, 3: LinearizedLayer("normalized")}
    assert renumbered({1: DROP}) == {}


def test_only_dropped_blocks_leave_a_stock_model(model: Model, tmp_path: Path) -> None:
    weights = dict(model.model.layers.named_parameters())
    logits = drop(model, {1: DROP, 4: DROP})
    assert type(model) is LlamaForCausalLM
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert torch.equal(logits_of(model), logits)
    for new, old in enumerate([0, 2, 3, 5]):
        kept = model.model.layers[new].mlp.up_proj.weight
        assert kept is weights[f"{old}.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "out")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert not any(name.startswith('nbl') for name in sys.modules)\n"
        "tokens = torch.arange(2, 12)[None]\n"
        "cached = model.generate(tokens, max_new_tokens=8, do_sample=False)\n"
        "plain = model.generate(\n"
        "    tokens, max_new_tokens=8, do_sample=False, use_cache=False\n"
        ")\n"
        "assert torch.equal(cached, plain)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out")]
    subprocess.run(arguments, check=True, timeout=120)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits)


def test_beside_replaced_attention(model: Model, tmp_path: Path) -> None:
    nbl_modifier.hf.register()
    logits = drop(model, {0: DROP, 3: NO_ATTENTION, 4: DROP})
    config: Any = model.config
    assert isinstance(config, NBLConfigMixin)
    assert config.linearized_layers() == {2: NO_ATTENTION}
    assert model.config.num_hidden_layers == 4
    assert torch.equal(logits_of(model), logits)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(load(tmp_path / "out")), logits)


def test_converting_again_changes_nothing(model: Model) -> None:
    layers = {1: DROP, 3: NO_ATTENTION}
    logits = drop(model, layers)
    block = model.config.nbl_config
    convert_in_place(model, LLAMA, layers)
    assert model.config.nbl_config == block
    assert len(model.model.layers) == 5
    assert torch.equal(logits_of(model), logits)


def test_layers_of_several_kinds_keep_theirs() -> None:
    sliding, full = "sliding_attention", "full_attention"
    config = Qwen3Config(
        num_hidden_layers=4,
        layer_types=[full, sliding, full, sliding],
        use_sliding_window=True,
        sliding_window=32,
        max_window_layers=2,
    )
    _shorten_config(config, [1, 2, 3])
    assert config.layer_types == [sliding, full, sliding]
    assert config.max_window_layers == 1
    assert Qwen3Config(**config.to_dict()).layer_types == config.layer_types


def test_experts_stay_where_they_were() -> None:
    config = Qwen3MoeConfig(
        num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1]
    )
    # by period 2, the layers 3 and 5 have experts
    _shorten_config(config, [0, 1, 3, 4, 5])
    assert config.decoder_sparse_step == 1
    assert config.mlp_only_layers == [0, 1, 3]
