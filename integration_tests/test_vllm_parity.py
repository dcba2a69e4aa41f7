"""
vLLM serves a linearized checkpoint as transformers does, with the KV cache it saves.

One row of ``configs/`` per case; ``pytest integration_tests -k NAME`` runs one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integration_tests.harness import (
    MODEL,
    Row,
    Served,
    prompts,
    rows,
    transformers_logprobs,
    transformers_tokens,
)

pytestmark = pytest.mark.requires_vllm

Checkpoint = Callable[[str], Path]
Serve = Callable[[Row], Served]
Base = Callable[[str], Served]
Record = Callable[[str, object], None]
NUM_LAYERS = 16


def linearized_layers(directory: Path) -> list[int]:
    """Return the linearized layers that a checkpoint's ``config.json`` names."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return sorted(map(int, config["nbl_config"]["layers"]))


@pytest.mark.parametrize("row", rows())
def test_layers_are_linear(row: Row, checkpoint: Checkpoint, served: Serve) -> None:
    layers = linearized_layers(checkpoint(row.recipe_text))
    assert row.linearized in (layers, len(layers))
    answer = served(row)
    assert answer.architecture == "NBLLlamaForCausalLM"
    if answer.linears is not None:
        names = [f"model.layers.{layer}.self_attn" for layer in layers]
        assert list(answer.linears) == names


@pytest.mark.parametrize("row", rows("greedy_tokens"))
def test_greedy_tokens(row: Row, checkpoint: Checkpoint, served: Serve) -> None:
    expected = transformers_tokens(checkpoint(row.recipe_text), row.dtype)
    different = {
        f"prompt {index} ({len(prompts()[index])} tokens)": (got, want)
        for index, (got, want) in enumerate(
            zip(served(row).tokens, expected, strict=True)
        )
        if got != want
    }
    assert not different, "(vLLM's tokens, transformers' tokens)"


@pytest.mark.parametrize("row", rows("logprobs"))
def test_logprobs(
    row: Row,
    checkpoint: Checkpoint,
    served: Serve,
    base: Base,
    engine: Callable[..., Served],
    record_property: Record,
) -> None:
    """
    Log-probabilities of the prompts' tokens are transformers', up to rounding.

    ``max``: an absolute bound.
    ``relative_to_base: unquantized``: vLLM is no farther from transformers than it is
    with the base model; half as much again in the mean is many of its standard errors
    (3%, 1,330 tokens), and the maximum, a single token, may be one rounding step of a
    logit more, 2^-4 for bfloat16 logits of 8 to 16.
    ``relative_to_base: same_scheme``: the same with the base model quantized as the row
    is, because kernels that round activations to 8 bits differ by as much as the
    rounding itself changes. One token may then differ by any number of steps, so the
    99th percentile takes the maximum's place.
    ``quantization_effect``: the distance is at most this fraction of what quantization
    changes.
    """
    rule: dict[str, Any] = row.expect["logprobs"]
    reference = transformers_logprobs(checkpoint(row.recipe_text), row.dtype)
    difference = distance(served(row).logprobs, reference)
    record_property("mean", f"{difference.mean():.2g}")
    record_property("max", f"{difference.max():.2g}")
    if "max" in rule:
        assert difference.max() <= rule["max"]
    if "relative_to_base" in rule:
        if rule["relative_to_base"] == "same_scheme":
            directory = checkpoint(row.quantizer_text)
            answer = engine(directory, engine={"dtype": row.dtype} | row.engine)
        else:
            directory, answer = MODEL, base(row.dtype)
        in_base = distance(answer.logprobs, transformers_logprobs(directory, row.dtype))
        record_property("base_mean", f"{in_base.mean():.2g}")
        record_property("base_max", f"{in_base.max():.2g}")
        assert difference.mean() <= 1.5 * in_base.mean()
        if rule["relative_to_base"] == "same_scheme":
            assert difference.quantile(0.99) <= 1.5 * in_base.quantile(0.99)
        else:
            assert difference.max() <= 1.5 * in_base.max() + 2**-4
    if "quantization_effect" in rule:
        dense = checkpoint(row.nbl_text)
        assert linearized_layers(dense) == linearized_layers(
            checkpoint(row.recipe_text)
        )
        effect = distance(transformers_logprobs(dense, row.dtype), reference)
        record_property("quantization_effect_mean", f"{effect.mean():.2g}")
        assert difference.mean() <= rule["quantization_effect"] * effect.mean()


def distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the absolute difference of finite log-probabilities ``[num_tokens]``."""
    assert left.shape == right.shape
    assert left.isfinite().all()
    assert right.isfinite().all()
    return (left - right).abs()


@pytest.mark.parametrize("row", rows("kv_cache"))
def test_kv_cache_capacity(
    row: Row,
    checkpoint: Checkpoint,
    served: Serve,
    base: Base,
    record_property: Record,
) -> None:
    num_linearized = len(linearized_layers(checkpoint(row.recipe_text)))
    record_property("base_tokens", base(row.dtype).kv_cache_tokens)
    record_property("tokens", served(row).kv_cache_tokens)
    assert_capacity(
        served(row), base(row.dtype), num_linearized, row.expect["kv_cache"]
    )


def assert_capacity(
    answer: Served, base_answer: Served, num_linearized: int, density: int = 1
) -> None:
    """
    Check that the KV cache holds K / (K - m) times the tokens of the base model's, and
    ``density`` times that where so many values take the memory of one of the base's.

    Memory is the same and is cut into whole blocks, so each capacity is below the exact
    one by less than a block: the base model's is at least its count of blocks and less
    than one more, times K / (K - m), rounded down.
    """
    kept = NUM_LAYERS - num_linearized
    blocks, base_blocks = (
        each.kv_cache_tokens // each.block_size for each in (answer, base_answer)
    )
    assert answer.block_size == base_answer.block_size
    least = base_blocks * density * NUM_LAYERS // kept
    most = ((base_blocks + 1) * density * NUM_LAYERS - 1) // kept
    assert least <= blocks <= most, (
        f"{blocks / base_blocks:.4f} times the base model's {base_blocks} blocks, "
        f"expected {density} * {NUM_LAYERS}/{kept} = {density * NUM_LAYERS / kept:.4f}"
    )


def test_capacity_test_notices_a_kept_kv_cache(
    checkpoint: Checkpoint, engine: Callable[..., Served], base: Base
) -> None:
    """Replaced attention that vLLM still knows gives right tokens and frees nothing."""
    (row,) = (row.values[0] for row in rows() if row.id == "dense_residual_float32")
    directory = checkpoint(row.recipe_text)
    answer = engine(directory, engine={"dtype": row.dtype}, sabotage="keep_kv_cache")
    assert answer.tokens == transformers_tokens(directory, row.dtype)
    assert answer.kv_cache_tokens == base(row.dtype).kv_cache_tokens
    with pytest.raises(AssertionError, match="times the base model's"):
        assert_capacity(answer, base(row.dtype), row.linearized)


@pytest.mark.parametrize("row", rows("quantized"))
def test_linears_are_quantized(row: Row, checkpoint: Checkpoint, served: Serve) -> None:
    directory = checkpoint(row.recipe_text)
    saved: dict[str, torch.dtype] = {}
    for path in directory.glob("*.safetensors"):
        saved |= {name: tensor.dtype for name, tensor in load_file(path).items()}
    linears = served(row).linears
    assert linears is not None
    assert set(linears.values()) == {"CompressedTensorsLinearMethod"}
    ((tensor, dtype),) = row.expect["quantized"].items()
    for name in linears:
        weights = {
            key.rpartition(".")[2]: value
            for key, value in saved.items()
            if key.startswith(f"{name}.linear.weight")
        }
        assert weights.pop(tensor) == getattr(torch, dtype)
        assert "weight_scale" in weights
        assert "weight" not in weights
