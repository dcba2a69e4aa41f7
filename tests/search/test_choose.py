# SPDX-License-Identifier: Apache-2.0
"""Which layers are taken: ranked once, or again after each replacement."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.search.runs import layer, run
from tests.tiny_llama import (
    Model,
    linearized,
    load,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cosine_is_that_of_the_stream_around_attention(
    llama: Path, rows: Dataset
) -> None:
    report = run(llama, rows, criterion="cosine", num_layers=2)[1]
    model = load(llama)
    seen: dict[int, list[float]] = {index: [] for index in range(4)}
    for index, decoder_layer in enumerate(model.model.layers):
        stream: list[Any] = []
        decoder_layer.input_layernorm.register_forward_pre_hook(
            lambda _, args, stream=stream: stream.append(args[0].double())
        )
        decoder_layer.self_attn.register_forward_hook(
            lambda _, __, output, stream=stream, index=index: seen[index].extend(
                torch.cosine_similarity(
                    stream[-1], stream[-1] + output[0].double(), dim=-1
                )
                .flatten()
                .tolist()
            )
        )
    for tokens in rows["input_ids"]:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
    expected = {index: 1 - sum(values) / len(values) for index, values in seen.items()}
    for index, value in expected.items():
        # cosines are of float32 rows
        assert layer(report, index).cosine == pytest.approx(value, abs=1e-6)
    assert [r.index for r in report.ranking] == sorted(
        expected, key=expected.__getitem__
    )


def test_residual_nmse_ranks(llama: Path, rows: Dataset) -> None:
    report = run(llama, rows, criterion="residual_nmse", num_layers=2)[1]
    scores = [result.residual_nmse for result in report.ranking]
    assert scores == sorted(scores)
    assert [result.score for result in report.ranking] == scores


def redundant_model(folder: Path) -> Path:
    """
    Save a model whose first two attention layers do the same, and the third another.

    A sequence starts with two keys, then queries alternate with their answers: token
    ``c_i`` to query 16 after key ``a_i``, ``d_j`` to query 17 after ``b_j``. The first
    two layers each carry ``a`` forward, the last one ``b``, by attending to everything
    alike; what a linear map of the current token cannot do.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=18,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(18, 32))
        for index, (key, written) in enumerate(((0, 20), (0, 20), (4, 24))):
            attention = model.model.layers[index].self_attn
            for i in range(4):
                attention.v_proj.weight[i, key + i] = 1.0
                attention.o_proj.weight[written + i, i] = 0.05
        # Which kind of token comes next depends on the last one, by a wide margin.
        head = model.lm_head.weight
        head[4:8, 0:4] = head[16:18, 4:16] = 400.0
        head[8:12, 16] = head[12:16, 17] = 400.0
        for i in range(4):
            head[8 + i, 20 + i] = head[12 + i, 24 + i] = 800.0
    model.save_pretrained(folder)
    return folder


def keyed_rows(num_rows: int = 32, num_queries: int = 10) -> Dataset:
    """Return what the redundant model predicts; query 16 is the more frequent one."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(num_rows):
        a, b = torch.randint(4, (2,), generator=generator).tolist()
        row = [a, 4 + b]
        for _ in range(num_queries):
            first = bool(torch.rand((), generator=generator) < 0.6)
            row += [16, 8 + a] if first else [17, 12 + b]
        rows.append(row)
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )


def test_greedy_sees_what_layers_do_for_each_other(tmp_path: Path) -> None:
    """Either of two equal layers can go, but not both."""
    folder, rows = redundant_model(tmp_path / "model"), keyed_rows()
    fields: dict[str, Any] = {"num_layers": 2, "criterion": "loss"}
    _, one_shot = run(folder, rows, **fields)
    model, greedy = run(folder, rows, **fields, selection="greedy")
    assert one_shot.selected_layers == [0, 1]
    assert 2 in greedy.selected_layers == linearized(model)
    assert one_shot.heldout is not None
    assert greedy.heldout is not None
    base, alone = greedy.heldout.base, greedy.heldout.path[0]
    assert alone is not None
    assert alone < 1.1 * base  # one of the two does no harm
    assert greedy.heldout.replaced < 0.5 * one_shot.heldout.replaced
    path = [result for result in greedy.ranking if result.selected]
    first, second = (result.score for result in path)
    assert first == pytest.approx(math.log(alone / base), abs=1e-6)
    assert second == pytest.approx(math.log(greedy.heldout.replaced / alone), abs=1e-6)


def test_greedy_fits_what_is_left_to_the_linear_model(
    llama: Path, rows: Dataset
) -> None:
    """Of a layer chosen later: the map of what attention does there by then."""
    model, report = run(llama, rows, num_layers=2, criterion="nmse", selection="greedy")
    first, second = (result.index for result in report.ranking[:2])
    assert first < second  # or the second would read the original stream
    partly, _ = run(llama, rows, layers=[first])
    expected, again = run(llama, rows, model=partly, layers=[second])
    new, old = (m.model.layers[second].self_attn.linear for m in (model, expected))
    # 1e-6: the partly linear model's activations are float32
    assert torch.allclose(new.weight, old.weight, rtol=0, atol=1e-6)
    assert report.ranking[1].score == pytest.approx(layer(again, second).nmse, rel=1e-5)
