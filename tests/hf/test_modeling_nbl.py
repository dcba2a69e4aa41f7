# SPDX-License-Identifier: Apache-2.0
"""
Linearized models in transformers: whichever layers are linear, generation gives the
same tokens with every kind of cache as without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
)

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
NEW_TOKENS = 20


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


def generate(model: Model, tokens: Tensor, **kwargs: Any) -> Tensor:
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    kwargs.setdefault("attention_mask", torch.ones_like(tokens))
    output: Tensor = model.generate(tokens, pad_token_id=0, **kwargs)
    return output


@pytest.fixture
def expected(model: Model) -> Tensor:
    """Return what is generated without any cache: every step from the start."""
    output = generate(model, prompt(), use_cache=False)
    new = output[:, prompt().shape[1] :]
    assert new.unique().numel() > 5  # a model that repeats itself would test nothing
    return output


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


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"cache_implementation": "dynamic"}, id="dynamic"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"prefill_chunk_size": 4}, id="chunked-prefill"),
    ],
)
def test_caches_do_not_change_tokens(
    model: Model, expected: Tensor, options: dict[str, Any]
) -> None:
    assert torch.equal(generate(model, prompt(), **options), expected)


@pytest.mark.parametrize("with_config", [False, True])
def test_dynamic_cache_of_ones_own(
    model: Model, expected: Tensor, with_config: bool
) -> None:
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    assert torch.equal(generate(model, prompt(), past_key_values=cache), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    for index in range(4):
        assert cache.get_seq_length(index) == expected.shape[1] - 1


def test_static_cache_of_ones_own(model: Model, expected: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=expected.shape[1])
    assert torch.equal(generate(model, prompt(), past_key_values=cache), expected)


def test_static_cache_allocated_in_advance(model: Model, expected: Tensor) -> None:
    """As torch.export and compiled serving do: all layers of the base model's shape."""
    cache = StaticCache(config=model.config, max_cache_len=expected.shape[1])
    cache.early_initialization(
        batch_size=2,
        num_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert torch.equal(generate(model, prompt(), past_key_values=cache), expected)


def test_beams(model: Model) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    expected = generate(model, prompt(), use_cache=False, **options)
    assert torch.equal(generate(model, prompt(), **options), expected)
    static = generate(model, prompt(), cache_implementation="static", **options)
    assert torch.equal(static, expected)


def test_prompt_lookup_goes_back_and_forth(model: Model) -> None:
    """Rejected guesses are cropped from the cache again."""
    tokens = prompt(batch=1).repeat(1, 3)
    expected = generate(model, tokens, use_cache=False)
    assert torch.equal(generate(model, tokens, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("cache", [False, True])
def test_left_padded_batch(model: Model, cache: bool) -> None:
    rows = [prompt(1, length) for length in (9, 4, 1)]
    padded = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, tokens in enumerate(rows):
        padded[row, 9 - tokens.shape[1] :] = tokens
        mask[row, 9 - tokens.shape[1] :] = 1
    together = generate(model, padded, attention_mask=mask, use_cache=cache)
    for row, tokens in enumerate(rows):
        alone = generate(model, tokens, use_cache=False)
        assert torch.equal(together[row, 9:], alone[0, tokens.shape[1] :])


def test_step_by_step_logits(model: Model) -> None:
    """Tokens could agree by luck; the numbers behind them must agree too."""
    tokens = prompt(2, 12)
    cache = DynamicCache(config=model.config)
    steps = []
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        for piece in tokens.split([5, 1, 1, 3, 2], dim=1):
            steps.append(model(piece, past_key_values=cache).logits)
    # float32 sums in another order; positions off by one change logits by 0.1 and more
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=5e-5)


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
