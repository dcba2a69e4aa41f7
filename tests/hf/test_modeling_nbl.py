# SPDX-License-Identifier: Apache-2.0
"""Linearized models in transformers: their arithmetic and their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModel, LlamaForCausalLM

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf import modeling_nbl
from nbl_modifier.hf.configuration_nbl import (
    LinearizedLayer,
    config_class,
    nbl_config_block,
)
from nbl_modifier.hf.modeling_nbl import (
    LinearizedAttention,
    decoder_layers,
    model_class,
)
from tests.tiny_llama import VOCAB_SIZE, Model, compress, load

pytestmark = pytest.mark.usefixtures("one_thread")

Kind = Literal["residual", "normalized"]
LLAMA = ARCHITECTURES["llama"]
LAYERS = {"first": [0], "last": [3], "neighbours": [1, 2], "all": [0, 1, 2, 3]}


@pytest.fixture(scope="module", params=["residual", "normalized"])
def kind(request: pytest.FixtureRequest) -> Kind:
    value: Kind = request.param
    return value


@pytest.fixture(scope="module", params=LAYERS)
def model(
    request: pytest.FixtureRequest, kind: Kind, llama: Path, rows: Dataset
) -> Model:
    recipe = NBLModifier(layers=LAYERS[request.param], input=kind)
    return compress(load(llama), recipe, rows).eval()


def prompt(batch: int = 2, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=generator)


def test_forward_is_that_of_the_modules(model: Model, kind: Kind) -> None:
    """The stock model's arithmetic with ``x + W x + b`` in place of attention."""
    hidden = model.get_input_embeddings()(prompt())
    positions = torch.arange(9)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if isinstance(attention, LinearizedAttention):
                norm = layer.input_layernorm
                assert isinstance(norm, nn.Identity) == (kind == "residual")
                seen = hidden if kind == "residual" else norm(hidden)
                mixed = seen @ attention.linear.weight.T + attention.linear.bias
            else:
                mixed, _ = attention(
                    layer.input_layernorm(hidden),
                    position_embeddings=rotary,
                    attention_mask=mask,
                )
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = model.lm_head(model.model.norm(hidden))
        actual = model(prompt()).logits
    # the same float32 operations but for the order of sums: 2^-24 each, some hundred
    torch.testing.assert_close(actual, logits, rtol=0, atol=2e-5)


# --- classes --------------------------------------------------------------------------


def skeleton(layers: dict[int, LinearizedLayer]) -> Any:
    """Return a configuration as it is loaded."""
    config: Any = config_class(LLAMA)
    return config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        nbl_config=nbl_config_block(layers),
    )


def test_class_builds_the_named_layers() -> None:
    config = skeleton(
        {1: LinearizedLayer("residual"), 3: LinearizedLayer("normalized")}
    )
    model = model_class("LlamaForCausalLM", LLAMA)(config)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "NBLLlamaForCausalLM"
    assert type(model) is modeling_nbl.NBLLlamaForCausalLM
    names = {name for name, _ in model.named_parameters()}
    for index in (1, 3):
        prefix = f"model.layers.{index}.self_attn."
        assert {name for name in names if name.startswith(prefix)} == {
            f"{prefix}linear.weight",
            f"{prefix}linear.bias",
        }
    assert "model.layers.1.input_layernorm.weight" not in names
    assert "model.layers.3.input_layernorm.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" in names


def test_no_linearized_layer_is_the_stock_model() -> None:
    model = model_class("LlamaForCausalLM", LLAMA)(skeleton({}))
    stock = LlamaForCausalLM(model.config)
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, stock(prompt()).logits)


def test_attention_can_be_exchanged() -> None:
    model = model_class("LlamaForCausalLM", LLAMA)(skeleton({1: LinearizedLayer()}))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_unknown_class_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="NBLGPT2Model"):
        _ = modeling_nbl.NBLGPT2Model


def test_decoder_without_head(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    model = compress(load(llama), NBLModifier(layers=[0, 2]), rows)
    model.save_pretrained(tmp_path / "out")
    nbl_modifier.hf.register()
    decoder, info = AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(decoder).__name__ == "NBLLlamaModel"
    assert not info["missing_keys"]
    assert decoder_layers(decoder, LLAMA) is decoder.layers
    assert decoder_layers(model, LLAMA) is model.model.layers
    with torch.no_grad():
        hidden = decoder(prompt()).last_hidden_state
        assert torch.equal(hidden, model.model(prompt()).last_hidden_state)
