# SPDX-License-Identifier: Apache-2.0
"""The chosen layers fitted again, to what those before them make of their input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset

from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from tests.llmcompressor_plugin.test_modifier import activations, assert_map
from tests.numerics import oracle
from tests.search.runs import run
from tests.tiny_llama import (
    DEMO_MODEL,
    Model,
    demo_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def stream_in_front(model: Model, index: int, rows: Dataset) -> np.ndarray:
    """Return what decoder layer ``index`` gets, ``[num_tokens, hidden_size]``."""
    seen: list[np.ndarray] = []
    handle = model.model.layers[index].register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double().numpy())
    )
    for tokens in rows["input_ids"]:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
    handle.remove()
    return np.concatenate(seen)


@pytest.mark.parametrize("kind", ["residual", "normalized"])
def test_refit_leads_back_to_the_original_stream(
    llama: Path, rows: Dataset, kind: Literal["residual", "normalized"]
) -> None:
    plain, _ = run(llama, rows, layers=[1, 3], input=kind)
    model, report = run(llama, rows, layers=[1, 3], input=kind, refit=True)
    assert report.refit
    original = activations(llama, rows)
    # The first layer reads what it always did.
    before, after = (m.model.layers[1].self_attn.linear for m in (plain, model))
    assert torch.allclose(before.weight, after.weight, rtol=0, atol=1e-6)
    # The other one reads what the first makes of it, and makes up for the difference.
    stream = stream_in_front(model, 3, rows)
    target = original[3].residual + original[3].output - stream
    X = stream
    if kind == "normalized":
        norm = model.model.layers[3].input_layernorm
        with torch.no_grad():
            X = norm(torch.tensor(stream, dtype=torch.float32)).double().numpy()
    # W is rounded to float32, and so was each activation: 1e-6 of the entries
    assert_map(model, 3, X, target, 1e-5)
    W, b = oracle.lmmse(X, target)
    linear = plain.model.layers[3].self_attn.linear
    W0, b0 = (t.detach().double().numpy() for t in (linear.weight, linear.bias))
    assert oracle.mse(X, target, W, b) < 0.99 * oracle.mse(X, target, W0, b0)


def test_refit_helps_a_trained_model() -> None:
    """On text that nothing was fitted on, eight of sixteen layers replaced."""
    texts = stdlib_texts("calibration")
    many = pack(texts, demo_tokenizer(), seq_length=256, num_sequences=64)
    layers = [0, 2, 3, 4, 8, 9, 11, 15]
    names = [f"model.layers.{index}.self_attn" for index in layers]
    fields: dict[str, Any] = {"criterion": "loss", "refit": True}
    _, report = run(DEMO_MODEL, many, targets=names, num_layers=8, **fields)
    assert report.selected_layers == layers
    assert report.heldout is not None
    assert report.heldout.refitted is not None
    assert report.heldout.refitted < 0.99 * report.heldout.replaced
