"""A linearized checkpoint in transformers: what was written, and what it generates."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import ContinuousBatchingConfig, GenerationConfig

from integration_tests.conftest import Materials
from integration_tests.materials import heldout_nll, load_model, max_tokens, prompts
from integration_tests.reference import Continuation, generate
from integration_tests.rows import Row, rows
from nbl_modifier.architectures import architecture_of
from nbl_modifier.records.compression import NBLReport

# The longest prompts outgrow sliding windows; a few show what all would.
NUM_PROMPTS = 3


@pytest.mark.parametrize("row", rows("calibrated"))
def test_calibrated(row: Row, made: Materials) -> None:
    """
    All layers that had attention were measured, the best-ranked replaced, nothing else
    is left.
    """
    directory = made.checkpoint(row.recipe_text, row.model)
    report = NBLReport.load(directory / "nbl_report.json")
    measured = {str(layer.index) for layer in report.layers}
    assert measured == attention_tensors(made.model(row.model)).keys()
    scores = {layer.index: layer.score or 0.0 for layer in report.layers}
    assert all(math.isfinite(score) and score for score in scores.values())
    ranked = sorted(scores, key=lambda index: scores[index])
    chosen = sorted(ranked[: len(report.selected_layers)])
    assert report.selected_layers == chosen
    assert row.linearized in (chosen, len(chosen))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert sorted(map(int, config["nbl_config"]["layers"])) == chosen
    left = attention_tensors(directory)
    assert left.keys() == measured
    for index, of_layer in left.items():
        linear = of_layer == {"linear.weight", "linear.bias"}
        assert linear == (int(index) in chosen)


def attention_tensors(directory: Path) -> dict[str, set[str]]:
    """Return the names of what is in attention's place, by the decoder layer's."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    attention = f".{architecture_of(config['model_type']).attention}."
    found: dict[str, set[str]] = {}
    for name in tensor_names(directory):
        if ".layers." in name and attention in name and "vision" not in name:
            index, _, of_layer = name.partition(".layers.")[2].partition(attention)
            found.setdefault(index, set()).add(of_layer)
    return found


@pytest.mark.parametrize("row", rows("recovery"))
def test_recovery(
    row: Row, made: Materials, record_property: Callable[[str, object], None]
) -> None:
    """
    Bits per byte of held-out text are at most the base model's over ``recovery``.

    Over the same tokens, and so the same bytes: a ratio of log-likelihoods. The
    threshold is from ``derive_thresholds.py``.
    """
    base = heldout_nll(row.model, made.model(row.model))
    found = base / heldout_nll(row.model, made.checkpoint(row.recipe_text, row.model))
    record_property("recovery", f"{found:.4f}")
    assert found >= row.expect["recovery"]


def tensor_names(directory: Path) -> set[str]:
    """Return the names of all tensors of a checkpoint."""
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


@pytest.mark.parametrize("row", rows("generation"))
def test_generation(row: Row, made: Materials) -> None:
    """
    A reloaded checkpoint generates with a cache as it does without one.

    A dynamic one, a static one, and several prompts at once, padded on their left;
    tokens are compared up to the first lead of less than ``ties_below``, nat.
    """
    directory = made.checkpoint(row.recipe_text, row.model)
    model = load_model(directory, getattr(torch, row.dtype))
    tie = row.expect["generation"]["ties_below"]
    longest = prompts(row.model)[-NUM_PROMPTS:]
    number = max_tokens(row.model)
    without = [generate(model, each, number, use_cache=False) for each in longest]
    for prompt, expected in zip(longest, without, strict=True):
        same(expected, generate(model, prompt, number).tokens, tie)
        static = generate(model, prompt, number, cache_implementation="static")
        same(expected, static.tokens, tie)
    for expected, tokens in zip(
        without, generate_padded(model, longest, number), strict=True
    ):
        same(expected, tokens, tie)


@pytest.mark.parametrize("row", rows("continuous_batching"))
def test_continuous_batching(row: Row, made: Materials) -> None:
    """
    Requests that are computed together, in the paged cache, give the tokens of each
    alone without a cache, up to the first lead of less than ``ties_below``, nat.
    """
    directory = made.checkpoint(row.recipe_text, row.model)
    model = load_model(directory, getattr(torch, row.dtype))
    # Its paged counterpart leaves out Gemma 2's soft-capping as torch's own does, eager
    # attention does not.
    model.set_attn_implementation("sdpa")
    tie = row.expect["continuous_batching"]["ties_below"]
    longest, number = prompts(row.model)[-NUM_PROMPTS:], max_tokens(row.model)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": -1}
    batch = model.generate_batch(
        longest,
        generation_config=GenerationConfig(
            max_new_tokens=number, pad_token_id=0, **settings
        ),
        # by itself it takes most of the machine's memory
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=32, num_blocks=64, max_batch_tokens=256
        ),
        progress_bar=False,
    )
    for prompt, request in zip(longest, batch.values(), strict=True):
        expected = generate(model, prompt, number, use_cache=False)
        same(expected, request.generated_tokens, tie)


def same(expected: Continuation, tokens: list[int], tie: float) -> None:
    """Compare tokens up to the first lead of less than ``tie``, at least one."""
    clear = next((i for i, lead in enumerate(expected.margins) if lead < tie), None)
    assert clear != 0
    assert tokens[:clear] == expected.tokens[:clear]


@torch.no_grad()
def generate_padded(
    model: torch.nn.Module, longest: list[list[int]], num_tokens: int
) -> list[list[int]]:
    """Return the greedy continuations of prompts that are padded to the longest."""
    width = max(map(len, longest))
    padding = [width - len(prompt) for prompt in longest]
    output = model.generate(  # type: ignore[operator]
        torch.tensor([[0] * n + p for n, p in zip(padding, longest, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    tokens: list[list[int]] = output[:, width:].tolist()
    return tokens
