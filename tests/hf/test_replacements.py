# SPDX-License-Identifier: Apache-2.0
"""
Everything that can take the place of attention or of a block, in transformers: what it
computes, and that caches, saving and loading do not change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import nbl_modifier.hf
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.checkpoint import convert_in_place
from nbl_modifier.hf.configuration_nbl import (
    LinearizedLayer,
    config_class,
    nbl_config_block,
)
from nbl_modifier.hf.modeling_nbl import (
    DroppedAttention,
    LinearizedBlock,
    LowRankLinear,
    decoder_layers,
    linearize_layer,
    model_class,
)
from tests.tiny_llama import VOCAB_SIZE, Model, load

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = ARCHITECTURES["llama"]
D = 32
LOW_RANK = LinearizedLayer("residual", rank=8)
NORMALIZED_LOW_RANK = LinearizedLayer("normalized", rank=8)
DROP = LinearizedLayer(method="drop")
DROP_BEHIND_NORM = LinearizedLayer("normalized", method="drop")
BLOCK = LinearizedLayer(kind="block")
LOW_RANK_BLOCK = LinearizedLayer(kind="block", rank=8)
CASES: dict[str, dict[int, LinearizedLayer]] = {
    "low-rank": {0: LOW_RANK, 2: NORMALIZED_LOW_RANK},
    "drop": {0: DROP, 2: DROP_BEHIND_NORM},
    "block": {0: BLOCK, 3: LOW_RANK_BLOCK},
    "all": {0: BLOCK, 1: DROP, 2: LOW_RANK, 3: LOW_RANK_BLOCK},
    "neighbours": {1: BLOCK, 2: LinearizedLayer("residual")},
}


def replace(model: Model, layers: dict[int, LinearizedLayer]) -> None:
    """Put random maps into a stock model, and make it a linearized one."""
    generator = torch.Generator().manual_seed(1)

    def linear(d_in: int, d_out: int, bias: bool = True) -> nn.Linear:
        made = nn.Linear(d_in, d_out, bias=bias)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=D**-0.5, generator=generator)
        return made

    for index, spec in layers.items():
        made: nn.Linear | LowRankLinear | None = linear(D, D)
        if spec.rank is not None:
            made = LowRankLinear(linear(D, spec.rank, False), linear(spec.rank, D))
        if spec.method == "drop":
            made = None
        linearize_layer(decoder_layers(model, LLAMA), LLAMA, index, spec, made)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> dict[int, LinearizedLayer]:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(llama: Path, case: dict[int, LinearizedLayer]) -> Model:
    model = load(llama).eval()
    replace(model, case)
    convert_in_place(model, LLAMA, case)
    return model


def prompt(batch: int = 2, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=generator)


def generate(model: Model, tokens: Tensor, **kwargs: Any) -> Tensor:
    output: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return output


def added(layer: Any, spec: LinearizedLayer, hidden: Tensor) -> Tensor:
    """Return what the replacement adds to the stream, from its weights."""
    if spec.method == "drop":
        return torch.zeros_like(hidden)
    linear = layer.linear if spec.kind == "block" else layer.self_attn.linear
    if spec.input == "normalized":
        hidden = layer.input_layernorm(hidden)
    if spec.rank is not None:
        hidden = hidden @ linear.reduce.weight.T
        linear = linear.expand
    return hidden @ linear.weight.T + linear.bias


def test_forward_is_that_of_the_modules(
    model: Model, case: dict[int, LinearizedLayer]
) -> None:
    hidden = model.get_input_embeddings()(prompt())
    rotary = model.model.rotary_emb(hidden, torch.arange(9)[None])
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            spec = case.get(index)
            if spec is None:
                arguments = {"position_embeddings": rotary, "attention_mask": mask}
                hidden = layer(hidden, **arguments)
                continue
            hidden = hidden + added(layer, spec, hidden)
            if spec.kind == "attention":
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = model.lm_head(model.model.norm(hidden))
        actual = model(prompt()).logits
    # the same float32 operations but for the order of sums: 2^-24 each, some hundred
    torch.testing.assert_close(actual, logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"prefill_chunk_size": 4}, id="chunked-prefill"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt-lookup"),
    ],
)
def test_caches_do_not_change_tokens(
    model: Model, case: dict[int, LinearizedLayer], options: dict[str, Any]
) -> None:
    tokens = prompt(batch=1)
    plain = {"num_beams": 3} if "num_beams" in options else {}
    expected = generate(model, tokens, use_cache=False, **plain)
    if len(case) < 4:  # without any attention the tokens soon repeat
        assert expected[:, 9:].unique().numel() > 2
    assert torch.equal(generate(model, tokens, **options), expected)


def test_step_by_step_logits(model: Model) -> None:
    tokens = prompt(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        steps = [
            model(piece, past_key_values=cache).logits
            for piece in tokens.split([5, 1, 1, 3, 2], dim=1)
        ]
    # float32 sums in another order; positions off by one change logits by 0.1 and more
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=5e-5)


def test_saved_and_loaded_is_the_same(model: Model, tmp_path: Path) -> None:
    nbl_modifier.hf.register()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model(prompt()).logits
        assert torch.equal(load(tmp_path)(prompt()).logits, expected)
        assert torch.equal(loaded(prompt()).logits, expected)


def test_hidden_states_of_every_layer(model: Model) -> None:
    """What collects hidden states goes by the class of a decoder layer."""
    with torch.no_grad():
        output = model(prompt(), output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in model.model.layers)


def test_names_of_the_weights() -> None:
    make_config: Any = config_class(LLAMA)
    config = make_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        nbl_config=nbl_config_block(CASES["all"]),
    )
    model = model_class("LlamaForCausalLM", LLAMA)(config)
    assert isinstance(model, LlamaForCausalLM)
    shapes = {name: tuple(w.shape) for name, w in model.model.layers.named_parameters()}
    norm_and_mlp = {
        f"{name}.weight": shape
        for name, shape in {
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (64, D),
            "mlp.up_proj": (64, D),
            "mlp.down_proj": (D, 64),
        }.items()
    }
    low_rank = {
        "linear.reduce.weight": (8, D),
        "linear.expand.weight": (D, 8),
        "linear.expand.bias": (D,),
    }
    expected = {
        0: {"linear.weight": (D, D), "linear.bias": (D,)},
        1: norm_and_mlp,
        2: {f"self_attn.{name}": shape for name, shape in low_rank.items()}
        | norm_and_mlp,
        3: low_rank,
    }
    assert shapes == {
        f"{index}.{name}": shape
        for index, layer in expected.items()
        for name, shape in layer.items()
    }
    assert isinstance(model.model.layers[1].self_attn, DroppedAttention)
    assert isinstance(model.model.layers[0], LinearizedBlock)
    assert type(model.model.layers[0]) is type(model.model.layers[3])


def test_dropped_block_in_memory_passes_the_stream_on(llama: Path) -> None:
    """While candidates are compared; a checkpoint has one layer less."""
    model, shorter = load(llama).eval(), load(llama).eval()
    spec = LinearizedLayer(kind="block", method="drop")
    linearize_layer(model.model.layers, LLAMA, 2, spec, None)
    del shorter.model.layers[2]
    shorter.config.num_hidden_layers = 3
    shorter.model.layers[2].self_attn.layer_idx = 2
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, shorter(prompt()).logits)
    assert torch.equal(generate(model, prompt()), generate(shorter, prompt()))
