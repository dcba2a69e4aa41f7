# SPDX-License-Identifier: Apache-2.0
"""
The KV cache of linearized models in transformers: whichever layers are linear, every
kind of cache and every way of generating gives what no cache gives, and replaced layers
hold next to nothing.

Prompts and continuations are longer than the sliding windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache as once
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.checkpoint import convert_in_place
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import (
    LinearizedAttention,
    decoder_layers,
    linearize_attention,
)
from tests.tiny_llama import Model
from tests.tiny_models import THOROUGH, VOCAB_SIZE, family_config

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 8
KV_HEADS, HEAD_DIM = 2, 8
# Hybrids alternate, sliding first: "first" and "second" are the first of their kind.
LAYERS = {"first": [0], "second": [1], "most": [0, 1, 3], "all": [0, 1, 2, 3]}
STOCK = "none"
# full attention, a window in all layers, a window in every other layer
FULL, SLIDING, HYBRID = "llama", "mistral", "gemma3_text"
PROMPT, NEW_TOKENS = 11, 12
LENGTH = PROMPT + NEW_TOKENS


@once
def model_of(family: str, layers: str) -> Model:
    """Return a random model of ``family`` with ``LAYERS[layers]``, or none, linear."""
    config = family_config(family)
    config.tie_word_embeddings = False  # or some repeat the last token
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = WINDOW
    architecture = ARCHITECTURES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto_class = getattr(transformers, architecture.auto_class)
        model: Model = auto_class.from_config(config).eval()
        hidden_size = config.get_text_config().hidden_size
        specs = {}
        for index in LAYERS.get(layers, []):
            inputs: Any = architecture.inputs
            specs[index] = LinearizedLayer(inputs[index % len(inputs)])
            linear = nn.Linear(hidden_size, hidden_size)
            layer = decoder_layers(model, architecture)[index]
            linearize_attention(layer, architecture, index, specs[index], linear)
    convert_in_place(model, architecture, specs)
    return model


@pytest.fixture(params=LAYERS)
def layers(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def families(*names: str) -> Callable[..., Any]:
    return pytest.mark.parametrize("family", names)


def tokens_of(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=generator)


def generate(model: Model, tokens: Tensor, **kwargs: Any) -> Tensor:
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    kwargs.setdefault("attention_mask", torch.ones_like(tokens))
    output: Tensor = model.generate(tokens, pad_token_id=0, **kwargs)
    return output


@once
def greedy(family: str, layers: str) -> Tensor:
    """Return what is generated without any cache: every step from the start."""
    output = generate(model_of(family, layers), tokens_of(2, PROMPT), use_cache=False)
    # Not one token over and over; all-linear models look at the last token only.
    assert layers == "all" or output[:, PROMPT:].unique().numel() > 5
    return output


@once
def whole_logits(family: str, layers: str) -> Tensor:
    """Return the logits of ``tokens_of(2, LENGTH)`` in one pass."""
    model = model_of(family, layers)
    with torch.no_grad():
        logits: Tensor = model(tokens_of(2, LENGTH), use_cache=False).logits
    return logits


def assert_same(logits: Tensor, expected: Tensor) -> None:
    # float32 sums in another order; positions off by one change logits by 0.1 and more
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def dynamic(model: Model) -> Cache:
    return DynamicCache(config=model.config)


def dynamic_without_config(model: Model) -> Cache:
    return DynamicCache()


def static(model: Model) -> Cache:
    return StaticCache(config=model.config, max_cache_len=LENGTH)


def static_in_advance(model: Model) -> Cache:
    """As torch.export does: each layer of the base model's shape."""
    cache = static(model)
    cache.early_initialization(
        batch_size=2,
        num_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return cache


CACHES = [dynamic, dynamic_without_config, static, static_in_advance]
each_cache = pytest.mark.parametrize("make_cache", CACHES, ids=lambda f: f.__name__)


# --- the same numbers -----------------------------------------------------------------


@each_cache
@families(*THOROUGH)
def test_step_by_step_logits(
    family: str, layers: str, make_cache: Callable[[Model], Cache]
) -> None:
    """Pieces that start, end and lie within and beyond the window."""
    model = model_of(family, layers)
    cache = make_cache(model)
    steps = []
    with torch.no_grad():
        for piece in tokens_of(2, LENGTH).split([5, 1, 1, 3, 4, 1, 1, 6, 1], dim=1):
            steps.append(model(piece, past_key_values=cache).logits)
    logits = torch.cat(steps, 1)
    assert_same(logits, whole_logits(family, layers))
    assert [int(cache.get_seq_length(index)) for index in range(4)] == [LENGTH] * 4


@families(FULL, SLIDING, HYBRID)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"prefill_chunk_size": 4}, id="chunked"),
        pytest.param(
            {"prefill_chunk_size": 4, "cache_implementation": "static"},
            id="chunked-static",
        ),
    ],
)
def test_greedy_tokens(family: str, layers: str, options: dict[str, Any]) -> None:
    model = model_of(family, layers)
    actual = generate(model, tokens_of(2, PROMPT), **options)
    assert torch.equal(actual, greedy(family, layers))


@families(FULL, SLIDING, HYBRID)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_beams(family: str, layers: str, kind: str) -> None:
    """Beam search reorders the cache at every step."""
    model, tokens = model_of(family, layers), tokens_of(2, PROMPT)
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, tokens, use_cache=False, **options)
    actual = generate(model, tokens, cache_implementation=kind, **options)
    assert torch.equal(actual, expected)


@families(FULL, SLIDING, HYBRID)
def test_prompt_lookup(family: str, layers: str) -> None:
    """Rejected guesses are cropped from the cache again."""
    model, tokens = model_of(family, layers), tokens_of(1, 4).repeat(1, 3)
    expected = generate(model, tokens, use_cache=False)
    assert torch.equal(generate(model, tokens, prompt_lookup_num_tokens=3), expected)


@families(FULL, SLIDING, HYBRID)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padded_batch(family: str, layers: str, kind: str) -> None:
    model = model_of(family, layers)
    rows = [tokens_of(1, length) for length in (PROMPT, 4, 1)]
    padded = torch.zeros(3, PROMPT, dtype=torch.long)
    for row, tokens in enumerate(rows):
        padded[row, PROMPT - tokens.shape[1] :] = tokens
    together = generate(
        model, padded, attention_mask=(padded > 0).long(), cache_implementation=kind
    )
    for row, tokens in enumerate(rows):
        alone = generate(model, tokens, use_cache=False)
        assert torch.equal(together[row, PROMPT:], alone[0, tokens.shape[1] :])


@families(*THOROUGH)
def test_continuous_batching(family: str) -> None:
    """The paged cache: requests of several lengths, computed together."""
    model = model_of(family, "most")
    rows = [tokens_of(1, length) for length in (PROMPT, 4, 1)]
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": -1}
    batch = model.generate_batch(
        [row[0].tolist() for row in rows],
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, pad_token_id=0, **settings
        ),
        # by itself it takes most of the machine's memory
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=WINDOW, num_blocks=32, max_batch_tokens=64
        ),
        progress_bar=False,
    )
    for row, request in zip(rows, batch.values(), strict=True):
        expected = generate(model, row, use_cache=False)[0, row.shape[1] :]
        assert request.generated_tokens == expected.tolist()


def shorter(cache: Cache) -> Tensor:
    cache.crop(-3)
    return torch.arange(2)


def repeated(cache: Cache) -> Tensor:
    cache.batch_repeat_interleave(2)
    return torch.tensor([0, 0, 1, 1])


def selected(cache: Cache) -> Tensor:
    rows = torch.tensor([1])
    cache.batch_select_indices(rows)
    return rows


def reordered(cache: Cache) -> Tensor:
    rows: Any = torch.tensor([1, 0])
    cache.reorder_cache(rows)
    return rows


@families(FULL, SLIDING, HYBRID)
@pytest.mark.parametrize(
    "change", [shorter, repeated, selected, reordered], ids=lambda f: f.__name__
)
def test_edited_cache(
    family: str, layers: str, change: Callable[[Cache], Tensor]
) -> None:
    """``change`` returns which rows of the batch the cache then holds."""
    model, tokens = model_of(family, layers), tokens_of(2, LENGTH)
    cache = dynamic(model)
    if change is shorter:  # otherwise sliding layers refuse to be cropped
        cache.activate_past_recording()
    with torch.no_grad():
        model(tokens[:, :PROMPT], past_key_values=cache)
        rows = change(cache)
        rest = tokens[rows, cache.get_seq_length() :]
        logits = model(rest, past_key_values=cache).logits
    expected = whole_logits(family, layers)[rows, -rest.shape[1] :]
    assert_same(logits, expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@families(FULL, SLIDING, HYBRID)
def test_generate_compiles(family: str) -> None:
    """As it does by itself on GPUs: each decoding step a graph without breaks."""
    compiler: Any = CompileConfig(backend="aot_eager", fullgraph=True)
    compiler.mode = None  # the default is one that only inductor has
    compiler._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiler}
    actual = generate(model_of(family, "most"), tokens_of(2, PROMPT), **options)
    assert torch.equal(actual, greedy(family, "most"))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_on_a_cache_allocated_in_advance() -> None:
    """A graph keeps the memory that it was given, of whatever shape."""
    model, tokens = model_of(FULL, "most"), tokens_of(2, LENGTH)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache, mask = static_in_advance(model), torch.ones_like(tokens)
    with torch.no_grad():
        steps = [
            compiled(piece, attention_mask=mask, past_key_values=cache).logits
            for piece in tokens.split([PROMPT] + [1] * NEW_TOKENS, dim=1)
        ]
    logits = torch.cat(steps, 1)
    assert_same(logits, whole_logits(FULL, "most"))


def test_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own wrapper allocates the cache in advance, as part of a module."""
    model = model_of(FULL, "most")
    settings = GenerationConfig(use_cache=True, cache_implementation="static")
    monkeypatch.setattr(model, "generation_config", settings)
    wrapper = TorchExportableModuleWithStaticCache(
        model, batch_size=1, max_cache_len=PROMPT
    )
    tokens = tokens_of(1, PROMPT)
    arguments = [
        {"input_ids": tokens[:, i : i + 1], "cache_position": torch.tensor([i])}
        for i in range(PROMPT)
    ]
    with torch.no_grad():
        exported = torch.export.export(wrapper, (), arguments[0]).module()
        steps = torch.cat([exported(**kwargs) for kwargs in arguments], 1)
        assert_same(steps, model(tokens, use_cache=False).logits)


def quantized_error(family: str, layers: str) -> tuple[float, Cache]:
    """Return what 8 bits change at most in the logits, and the cache."""
    model = model_of(family, layers)
    options = {"axis_key": 1, "axis_value": 1, "q_group_size": HEAD_DIM}
    cache = QuantizedCache("hqq", model.config, nbits=8, residual_length=4, **options)
    with torch.no_grad():
        steps = [
            model(piece, past_key_values=cache).logits
            for piece in tokens_of(2, LENGTH).split([5] + [1] * (LENGTH - 5), dim=1)
        ]
    difference = torch.cat(steps, 1) - whole_logits(family, layers)
    return difference.abs().max().item(), cache


@families(FULL)
def test_quantized_cache(family: str, layers: str) -> None:
    """Kept layers are quantized; replaced ones have nothing to quantize."""
    error, cache = quantized_error(family, layers)
    base_error, _ = quantized_error(family, STOCK)
    # of rounding in three layers or fewer, not four; wrong positions give 2 and more
    assert error <= 2 * base_error
    quantized = [isinstance(layer, QuantizedLayer) for layer in cache.layers]
    assert quantized == [index not in LAYERS[layers] for index in range(4)]


def test_cache_of_any_name() -> None:
    """GPT-NeoX, for one, calls it ``layer_past``."""
    cache = DynamicCache()
    LinearizedAttention(nn.Linear(4, 4), 0)(torch.zeros(2, 3, 4), layer_past=cache)
    assert cache.get_seq_length() == 3


# --- memory ---------------------------------------------------------------------------


def bytes_of(layer: Any) -> int:
    """Return the memory behind a layer's keys and values, whatever part is in use."""
    return sum(
        tensor.untyped_storage().nbytes()
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    )


def check_bytes(cache: Cache, base: Cache, replaced: list[int]) -> None:
    for index, (layer, base_layer) in enumerate(
        zip(cache.layers, base.layers, strict=True)
    ):
        share = KV_HEADS * HEAD_DIM if index in replaced else 1
        assert bytes_of(layer) * share == bytes_of(base_layer) > 0, index


@each_cache
@families(FULL, SLIDING, HYBRID)
def test_replaced_layers_hold_two_numbers_per_token(
    family: str, layers: str, make_cache: Callable[[Model], Cache]
) -> None:
    """One key and one value, where attention holds heads x head size of each."""
    model, stock = model_of(family, layers), model_of(family, STOCK)
    cache, base = make_cache(model), make_cache(stock)
    generate(model, tokens_of(2, PROMPT), past_key_values=cache)
    generate(stock, tokens_of(2, PROMPT), past_key_values=base)
    check_bytes(cache, base, LAYERS[layers])


@families(FULL, SLIDING, HYBRID)
def test_generate_allocates_two_numbers_per_token_in_advance(
    family: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first token, where ``generate()`` compiles the prefill, too."""
    model = model_of(family, layers)
    base = static_in_advance(model)
    caches: list[Cache] = []
    early = StaticCache.early_initialization

    def spy(cache: Cache, *args: Any, **kwargs: Any) -> None:
        early(cache, *args, **kwargs)
        check_bytes(cache, base, LAYERS[layers])
        caches.append(cache)

    monkeypatch.setattr(StaticCache, "early_initialization", spy)
    monkeypatch.setattr(model, "_previous_max_cache_length", LENGTH, raising=False)
    options = {"cache_implementation": "static", "prefill_chunk_size": 4}
    generate(model, tokens_of(2, PROMPT), **options)
    (cache,) = caches
    check_bytes(cache, base, LAYERS[layers])
