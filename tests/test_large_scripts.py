# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serving_load.py, large_model.py, layer_cost.py, logits.py: short parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import large_model, layer_cost, logits, serving_load
from nbl_modifier.kv_cache import KVCache
from tests.tiny_llama import DEMO_MODEL, demo_tokenizer, load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_requests_are_short_and_long_and_share_beginnings(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "requests.jsonl", demo_tokenizer()
    prompts, answers = serving_load.write_requests(tokenizer, 32, path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert sum(row["output_tokens"] for row in rows) == answers
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    assert sum(lengths) == pytest.approx(prompts, rel=0.05)
    assert min(lengths) < 130
    assert max(lengths) > 500
    beginnings = [row["prompt"][:200] for row in rows]
    shared = [each for each in beginnings if beginnings.count(each) > 1]
    assert len(shared) > len(rows) / 3
    assert 2 <= len(set(shared)) <= serving_load.PREFIXES
    again = tmp_path / "again.jsonl"
    serving_load.write_requests(tokenizer, 32, again)
    assert again.read_bytes() == path.read_bytes()


def test_cache_is_that_of_the_base_model_in_the_dtype_of_the_run() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text("utf-8"))
    nbytes = serving_load.cache_bytes(DEMO_MODEL, "float32", 1000)
    assert nbytes == KVCache.from_config(config | {"dtype": "float32"}).size(1000)
    assert nbytes == 2 * serving_load.cache_bytes(DEMO_MODEL, "bfloat16", 1000)


def test_ratios_are_of_the_same_round() -> None:
    keys = ["kv_cache_tokens", *(key for _, key, _ in serving_load.FIGURES)]
    rounds = {
        "base": [dict.fromkeys(keys, value) for value in (1.0, 4.0)],
        "nbl": [dict.fromkeys(keys, value) for value in (2.0, 8.0)],
    }
    table = " ".join(serving_load.tables(["base", "nbl"], rounds).split())
    assert "| times base, of the same round | 1.000 | 2.000 |" in table
    assert "| preemptions | 2 (1..4) | 5 (2..8) |" in table


def test_a_model_written_by_layers_is_one(tmp_path: Path) -> None:
    arguments = ["--hidden-size", "32", "--intermediate-size", "64", "--layers", "3"]
    arguments += ["--heads", "4", "--kv-heads", "2", "--vocab-size", "64"]
    total = large_model.write_model(tmp_path, large_model.parse_args(arguments))
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 + 3  # layers, and embedding, norm and head
    model = load(tmp_path)
    assert sum(weight.nbytes for weight in model.parameters()) == total
    weight = model.model.layers[2].mlp.up_proj.weight
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def growth(num_bytes: int) -> int:
    """Return how much more memory there was, at most, with a block of this size."""
    with large_model.Resident() as before:
        pass
    with large_model.Resident() as memory:
        block = torch.ones(num_bytes, dtype=torch.uint8)
        large_model.time.sleep(20 * large_model.SAMPLE_SECONDS)
        del block
    return memory.private - before.private


def test_the_most_memory_is_what_there_was_at_any_moment() -> None:
    """Anything else of this process may be freed, or swapped out, meanwhile."""
    size = 2**26
    assert any(growth(size) == pytest.approx(size, rel=0.2) for _ in range(20))


def test_growth_with_width_is_that_of_the_operations() -> None:
    """Twice as wide: statistics four times, a solution eight times the operations."""
    one, two = layer_cost.small(512), layer_cost.small(1024)
    assert two.sums(10) == 4 * one.sums(10)
    assert two.solution == 8 * one.solution
    large = layer_cost.LARGE["Llama-3.1-8B"]
    # 218 million weights of a layer, 2 operations each; attention at 2,048 tokens
    weights = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    assert large.forward(2048, 2048) == pytest.approx(
        2 * 2048 * weights + 4 * 4096 * 2048 * 2049 / 2
    )


def test_parts_of_logits_give_the_same_gradient() -> None:
    """As small ones as that, and all at once."""
    original = torch.randn(1, 9, 50)
    gradients = []
    for at_a_time in (100, 10_000):
        each = torch.randn(1, 9, 50, generator=torch.manual_seed(0), requires_grad=True)
        assert logits.seconds(each, original, at_a_time) > 0
        assert each.grad is not None
        gradients.append(each.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=1e-7)
