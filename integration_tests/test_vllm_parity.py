"""
vLLM serves a linearized checkpoint as transformers does, with the KV cache it saves.

Each test reads one key of ``expect`` in the rows of ``configs/`` and ``families.yaml``;
``pytest integration_tests -k NAME`` runs one row.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integration_tests.conftest import Materials
from integration_tests.harness import Served
from integration_tests.materials import engine_defaults, prompts
from integration_tests.reference import Reference, prompt_logprobs, reference
from integration_tests.rows import Row, more_families, rows
from nbl_modifier.architectures import architecture_of
from nbl_modifier.kv_cache import Engine, KVCache

pytestmark = pytest.mark.requires_vllm

Serve = Callable[[Row], Served]
StartEngine = Callable[..., Served]
Record = Callable[[str, object], None]


def linearized_layers(directory: Path) -> list[int]:
    """Return the linearized layers that a checkpoint's ``config.json`` names."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return sorted(map(int, config["nbl_config"]["layers"]))


def in_transformers(row: Row, made: Materials) -> Path:
    """Return the checkpoint of a row for transformers, with any adapter merged."""
    directory = made.checkpoint(row.recipe_text, row.model)
    return made.merged(directory) if row.lora else directory


def expected_answer(row: Row, made: Materials) -> Reference:
    """Return transformers' answer to a row."""
    return reference(in_transformers(row, made), row.dtype, row.model)


def expected_logprobs(row: Row, made: Materials) -> torch.Tensor:
    """Return only its log-probabilities of the prompts' tokens."""
    return prompt_logprobs(in_transformers(row, made), row.dtype, row.model)


@pytest.mark.parametrize("row", rows("linears"))
def test_layers_are_linear(row: Row, made: Materials, served: Serve) -> None:
    directory = made.checkpoint(row.recipe_text, row.model)
    layers = linearized_layers(directory)
    assert row.linearized in (layers, len(layers))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    answer = served(row)
    assert [answer.architecture] == config["architectures"]
    assert answer.architecture.startswith("NBL")
    if answer.linears is not None:
        names = sorted(name.split(".layers.")[1] for name in answer.linears)
        assert names == linear_modules(directory)


def linear_modules(directory: Path) -> list[str]:
    """Return what linear layers took the place of, by name inside the layer list."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(config["model_type"])
    attention = architecture.vllm_attention or "self_attn"
    return sorted(
        index if entry["kind"] == "block" else f"{index}.{attention}"
        for index, entry in config["nbl_config"]["layers"].items()
        if entry["method"] == "linear"
    )


@pytest.mark.parametrize("row", rows("greedy_tokens"))
def test_greedy_tokens(
    row: Row, made: Materials, served: Serve, record_property: Record
) -> None:
    """
    Greedy tokens are transformers'.

    ``equal``: all of them.
    ``ties_below``: of each prompt those before the first whose lead over the next best
    token is smaller than this, nat, which either implementation may pick.
    """
    expected = expected_answer(row, made)
    compared = clear_tokens(row, expected)
    for prompt, got, want, clear in zip(
        prompts(row.model), served(row).tokens, expected.tokens, compared, strict=True
    ):
        message = f"after {len(prompt)} tokens: (vLLM's, transformers')"
        assert (got[:clear], len(got)) == (want[:clear], len(want)), message
    total = sum(map(len, expected.tokens))
    record_property("compared", f"{sum(compared)} of {total}")
    assert sum(compared) >= total / 2


@pytest.mark.parametrize("row", rows("token_logprobs"))
def test_token_logprobs(
    row: Row, made: Materials, served: Serve, record_property: Record
) -> None:
    """Log-probabilities of those tokens are transformers', to ``max``."""
    expected = expected_answer(row, made)
    differences = [
        abs(got - want)
        for gots, wants, clear in zip(
            served(row).token_logprobs,
            expected.token_logprobs,
            clear_tokens(row, expected),
            strict=True,
        )
        for got, want in zip(gots[:clear], wants[:clear], strict=True)
    ]
    record_property("max", f"{max(differences):.2g}")
    assert max(differences) <= row.expect["token_logprobs"]["max"]


def clear_tokens(row: Row, expected: Reference) -> list[int]:
    """Return how many tokens after each prompt can be compared."""
    rule = row.expect["greedy_tokens"]
    tie = 0.0 if rule == "equal" else rule["ties_below"]
    return [
        next((i for i, lead in enumerate(margins) if lead < tie), len(margins))
        for margins in expected.margins
    ]


@pytest.mark.parametrize("row", rows("logprobs"))
def test_logprobs(
    row: Row,
    made: Materials,
    served: Serve,
    engine: StartEngine,
    record_property: Record,
) -> None:
    """
    Log-probabilities of the prompts' tokens are transformers', up to rounding.

    ``max``: an absolute bound.
    ``rounding: transformers``: vLLM is no farther from what the same weights give in
    float32 than transformers is, both computing in the row's dtype; half as much again
    in the mean is many of its standard errors (3%, 1,330 tokens), and the maximum, a
    single token, may be one rounding step of a logit more, 2^-4 for bfloat16 logits of
    8 to 16.
    ``rounding: quantized base``: vLLM is no farther from transformers than it is with
    the base model quantized as the row is, because quantized kernels round otherwise.
    One token may then differ by any number of steps, so the 99th percentile takes the
    maximum's place.
    ``quantization_effect``: the distance is at most this fraction of what quantization
    changes.
    """
    rule: dict[str, Any] = row.expect["logprobs"]
    expected = expected_logprobs(row, made)
    difference = distance(served(row).logprobs, expected)
    record_distance(record_property, "", difference)
    if "max" in rule:
        assert difference.max() <= rule["max"]
    if rule.get("rounding") == "transformers":
        exact = prompt_logprobs(
            in_transformers(row, made), row.dtype, row.model, in_float32=True
        )
        difference = distance(served(row).logprobs, exact)
        record_distance(record_property, "exact_", difference)
        allowed = distance(expected, exact)
        record_distance(record_property, "transformers_exact_", allowed)
        assert difference.mean() <= 1.5 * allowed.mean()
        assert difference.max() <= 1.5 * allowed.max() + 2**-4
    if rule.get("rounding") == "quantized base":
        directory = made.checkpoint(row.quantizer_text, row.model)
        answer = engine(directory, row.model, engine={"dtype": row.dtype} | row.engine)
        in_base = distance(
            answer.logprobs, prompt_logprobs(directory, row.dtype, row.model)
        )
        record_distance(record_property, "base_", in_base)
        assert difference.mean() <= 1.5 * in_base.mean()
        assert difference.quantile(0.99) <= 1.5 * in_base.quantile(0.99)
    if "quantization_effect" in rule:
        dense = made.checkpoint(row.nbl_text, row.model)
        quantized = made.checkpoint(row.recipe_text, row.model)
        assert linearized_layers(dense) == linearized_layers(quantized)
        unquantized = prompt_logprobs(dense, row.dtype, row.model)
        effect = distance(unquantized, expected)
        record_property("quantization_effect_mean", f"{effect.mean():.2g}")
        assert difference.mean() <= rule["quantization_effect"] * effect.mean()


def record_distance(record: Record, prefix: str, difference: torch.Tensor) -> None:
    """Keep the mean, the 99th percentile and the maximum of a distance."""
    record(f"{prefix}mean", f"{difference.mean():.2g}")
    record(f"{prefix}p99", f"{difference.quantile(0.99):.2g}")
    record(f"{prefix}max", f"{difference.max():.2g}")


def distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the absolute difference of finite log-probabilities ``[num_tokens]``."""
    assert left.shape == right.shape
    assert left.isfinite().all()
    assert right.isfinite().all()
    return (left - right).abs()


@pytest.mark.parametrize("row", rows("kv_cache"))
def test_kv_cache_capacity(
    row: Row, made: Materials, served: Serve, base: Serve, record_property: Record
) -> None:
    """
    As many tokens fit in the KV cache as the layers that are left need.

    ``kv_cache``: how many of its values take the memory of one of the base model's.
    """
    directory = made.checkpoint(row.recipe_text, row.model)
    record_property("base_tokens", base(row).kv_cache_tokens)
    record_property("tokens", served(row).kv_cache_tokens)
    assert_capacity(served(row), base(row), row, directory)


def assert_capacity(
    answer: Served, base_answer: Served, row: Row, directory: Path
) -> None:
    """
    Check that the KV cache holds K / (K - m) times the tokens of the base model's.

    As often as one layer's cache is spread over processes; where the layers are spread,
    the process with most layers left decides. Memory is the same and is cut into whole
    blocks, so each capacity is below the exact one by less than a block: the base
    model's is at least its count of blocks and less than one more.

    Layers with and without a sliding window take turns in the same memory, if there are
    as many of one kind as of the other (vllm 0.32.0, v1/core/kv_cache_utils.py): those
    of the more frequent kind count.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if row.model in more_families():  # one process, layers of any kinds
        length = engine_defaults(row.model)["max_model_len"]
        prefix_caching = row.engine.get("enable_prefix_caching", True)
        engine = Engine(base_answer.block_size, length, prefix_caching)
        cache = KVCache.from_config(config)
        count = config.get("text_config", config)["num_hidden_layers"]
        base_cache = KVCache.of_base_model(config, count)
        times = base_cache.allotted(length, engine) / cache.allotted(length, engine)
        found = answer.kv_cache_tokens / base_answer.kv_cache_tokens
        assert found == pytest.approx(times, rel=0.01)
        return
    text_config = config.get("text_config", config)
    num_layers = text_config["num_hidden_layers"]
    kinds = text_config.get("layer_types") or ["full_attention"] * num_layers
    kept = sorted(set(range(num_layers)).difference(linearized_layers(directory)))
    for layers in (range(num_layers), kept):
        assert len(set(Counter(kinds[layer] for layer in layers).values())) == 1

    def most_of_a_kind(layers: Iterable[int]) -> int:
        return max(Counter(kinds[layer] for layer in layers).values())

    per_stage = num_layers // row.pipeline_parallel
    busiest = max(
        most_of_a_kind(layer for layer in kept if layer // per_stage == stage)
        for stage in range(row.pipeline_parallel)
    )
    all_layers = most_of_a_kind(range(num_layers))
    times = row.expect["kv_cache"] * row.tensor_parallel * all_layers
    assert_holds(answer, base_answer, times, busiest)


def assert_holds(answer: Served, base_answer: Served, times: int, busiest: int) -> None:
    """Check that ``times / busiest`` times the base model's tokens fit."""
    blocks, base_blocks = (
        each.kv_cache_tokens // each.block_size for each in (answer, base_answer)
    )
    assert answer.block_size == base_answer.block_size
    least = base_blocks * times // busiest
    most = ((base_blocks + 1) * times - 1) // busiest
    assert least <= blocks <= most, (
        f"{blocks / base_blocks:.4f} times the base model's {base_blocks} blocks, "
        f"expected {times / busiest:.4f}"
    )


def test_capacity_test_notices_a_kept_kv_cache(
    made: Materials, engine: StartEngine, base: Serve
) -> None:
    """Replaced attention that vLLM still knows gives right tokens and frees nothing."""
    (row,) = (row.values[0] for row in rows() if row.id == "dense_residual_float32")
    directory = made.checkpoint(row.recipe_text)
    answer = engine(directory, engine={"dtype": row.dtype}, sabotage="keep_kv_cache")
    assert answer.tokens == expected_answer(row, made).tokens
    assert answer.kv_cache_tokens == base(row).kv_cache_tokens
    with pytest.raises(AssertionError, match="times the base model's"):
        assert_capacity(answer, base(row), row, directory)


@pytest.mark.parametrize("row", rows("quantized"))
def test_linears_are_quantized(row: Row, made: Materials, served: Serve) -> None:
    directory = made.checkpoint(row.recipe_text, row.model)
    saved: dict[str, torch.dtype] = {}
    for path in directory.glob("*.safetensors"):
        saved |= {name: tensor.dtype for name, tensor in load_file(path).items()}
    linears = served(row).linears
    assert linears is not None
    assert len(linears) == len(linearized_layers(directory))
    assert set(linears.values()) == {"CompressedTensorsLinearMethod"}
    ((tensor, dtype),) = row.expect["quantized"].items()
    for name in linears:
        found: dict[str, dict[str, torch.dtype]] = {}
        for key, value in saved.items():
            module, _, kind = key.rpartition(".")
            if module.startswith(f"{name}.linear") and kind != "bias":
                found.setdefault(module, {})[kind] = value
        assert len(found) in (1, 2)  # two factors, if it is of low rank
        for weights in found.values():
            assert weights.pop(tensor) == getattr(torch, dtype)
            assert "weight_scale" in weights
            assert "weight" not in weights


def test_dropped_blocks_need_no_plugin(
    made: Materials, engine: StartEngine, base: Serve
) -> None:
    """A model that is only shorter is one that any vLLM serves."""
    fields = {"num_layers": 4, "kind": "block", "method": "drop", "criterion": "cosine"}
    recipe = {"default_stage": {"default_modifiers": {"NBLModifier": fields}}}
    row = Row("shorter", recipe, 4, "float32", {})
    directory = made.checkpoint(row.recipe_text)
    answer = engine(
        directory, engine={"dtype": row.dtype}, environment={"VLLM_PLUGINS": ""}
    )
    assert answer.architecture == "LlamaForCausalLM"
    expected = expected_answer(row, made)
    assert answer.tokens == expected.tokens
    # float32 sums in another order
    assert distance(answer.logprobs, expected.logprobs).max() <= 1e-4
    assert_holds(answer, base(row), 16, 12)


@pytest.mark.parametrize("row", rows("lora_effect"))
def test_adapter_matters(row: Row, made: Materials) -> None:
    """An adapter that vLLM ignored would be noticed: ``lora_effect`` nat on average."""
    directory = made.checkpoint(row.recipe_text, row.model)
    without = prompt_logprobs(directory, row.dtype, row.model)
    effect = distance(expected_logprobs(row, made), without)
    assert effect.mean() >= row.expect["lora_effect"]


@pytest.mark.parametrize("row", rows("prefix_cache"))
def test_prefix_cache(row: Row, served: Serve, record_property: Record) -> None:
    """
    The second time all whole blocks of a prompt are there already, but for the last
    token, which must be computed; what comes out is the same.
    """
    answer = served(row)
    assert answer.repeated is not None
    size = answer.block_size
    whole = [(len(prompt) - 1) // size * size for prompt in prompts(row.model)]
    assert answer.repeated["cached_tokens"] == whole
    record_property("cached_tokens", f"{sum(whole)} of {sum(map(len, prompts()))}")
    assert sum(whole) >= row.expect["prefix_cache"]
    assert answer.repeated["tokens"] == answer.tokens


@pytest.mark.parametrize("row", rows("chunked_prefill"))
def test_chunked_prefill(row: Row, served: Serve) -> None:
    """Prompts come in at least this many pieces (and the tokens are right)."""
    assert served(row).chunked_prefill
    longest = max(map(len, prompts(row.model)))
    pieces = -(-longest // row.engine["max_num_batched_tokens"])
    assert pieces >= row.expect["chunked_prefill"]


@pytest.mark.parametrize("row", rows("speculative"))
def test_speculative_decoding(row: Row, served: Serve, record_property: Record) -> None:
    """
    A draft model proposes tokens, ``drafted`` and ``accepted`` at least; those that
    come out are the model's own.
    """
    answer = served(row)
    drafted, accepted = (
        answer.counters[f"vllm:spec_decode_num_{name}_tokens"]
        for name in ("draft", "accepted")
    )
    record_property("drafted", drafted)
    record_property("accepted", accepted)
    assert drafted >= row.expect["speculative"]["drafted"]
    assert accepted >= row.expect["speculative"]["accepted"]
    if row.expect["greedy_tokens"] == "equal":
        alone = {k: v for k, v in row.engine.items() if k != "speculative_config"}
        assert answer.tokens == served(replace(row, engine=alone)).tokens


@pytest.mark.parametrize("row", rows("unsupported"))
def test_unsupported(
    row: Row,
    made: Materials,
    raw: Callable[..., Any],
    job: Callable[[Row, Path], dict[str, Any]],
) -> None:
    """What vLLM cannot do with this family it cannot do without NBL either."""
    assert row.unsupported is not None
    for recipe in (row.recipe_text, row.quantizer_text):
        directory = made.checkpoint(recipe, row.model)
        result, log = raw(directory, row.model, **job(row, directory))
        assert result.keys() == {"error"}
        output = result["error"] + log.read_text(encoding="utf-8", errors="replace")
        assert row.unsupported in output
