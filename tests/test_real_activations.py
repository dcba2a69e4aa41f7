# SPDX-License-Identifier: Apache-2.0
"""
The paper's algorithms on a real language model, whose activations are massive.

A few tokens of SmolLM2 set the variance of a few channels from its layer 11 on: the
residual stream's largest is tens of thousands of times its median, and the condition
number of C_xx 1e7. W, b, bounds and ranking are still those of Algorithms 1 and 2 in
scipy and float64, to 1e-6.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.numerics import CovarianceAccumulator, nmse_bound, solve_lmmse
from nbl_modifier.records.compression import NBLReport
from tests.llmcompressor_plugin.test_modifier import (
    Activations,
    activations,
    assert_map,
)
from tests.numerics import oracle
from tests.tiny_llama import Model, compress, linearized

pytestmark = [pytest.mark.real_model, pytest.mark.begin]

# Before the massive activations, where they begin, and behind.
LAYERS = [3, 11, 12, 13]
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model without the layers behind those: half the work."""
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, num_hidden_layers=LAYERS[-1] + 1, dtype=torch.float32
    )
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(smollm2: Path) -> Dataset:
    """Return 6,144 tokens, more than ten for each of 576 dimensions."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return pack(stdlib_texts("calibration"), tokenizer, 512, 12)


@pytest.fixture(scope="module")
def plain(folder: Path, rows: Dataset) -> list[Activations]:
    return activations(folder, rows, indices=LAYERS)


@pytest.fixture(scope="module")
def compressed(folder: Path, smollm2: Path, rows: Dataset) -> tuple[Model, NBLReport]:
    recipe = NBLModifier(layers=LAYERS)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = compress(folder, recipe, rows, processor=tokenizer, batch_size=4)
    assert recipe.report is not None
    return model, recipe.report


def test_activations_are_massive(plain: list[Activations]) -> None:
    """Otherwise the tests below would show less than they say."""
    for seen in plain[LAYERS.index(12) :]:
        variance = seen.residual.var(axis=0)
        assert variance.max() > 1e4 * np.median(variance)
        assert np.linalg.cond(np.cov(seen.residual.T)) > 1e6


@pytest.mark.parametrize("index", LAYERS)
def test_map_and_bound(plain: list[Activations], index: int) -> None:
    """What is computed before anything is rounded to the model's dtype."""
    seen = plain[LAYERS.index(index)]
    X, A = seen.residual, seen.output
    accumulator = CovarianceAccumulator(X.shape[1], A.shape[1])
    for x, a in zip(np.array_split(X, 12), np.array_split(A, 12), strict=True):
        accumulator.update(torch.from_numpy(x), torch.from_numpy(a))
    stats = accumulator.finalize()
    found = solve_lmmse(stats)
    assert found.dampening_frac == 0.0
    W, b = oracle.lmmse(X, A)
    assert np.linalg.norm(found.weight.numpy() - W) <= TOLERANCE * np.linalg.norm(W)
    assert np.linalg.norm(found.bias.numpy() - b) <= TOLERANCE * np.linalg.norm(b)
    bound = nmse_bound(stats.plus_input())
    assert bound == pytest.approx(seen.bound, rel=TOLERANCE)


def test_checkpoint_and_report(
    compressed: tuple[Model, NBLReport], plain: list[Activations]
) -> None:
    model, report = compressed
    assert linearized(model) == LAYERS
    bounds = {index: seen.bound for index, seen in zip(LAYERS, plain, strict=True)}
    by_bound = sorted(LAYERS, key=lambda index: bounds[index])
    assert [layer.index for layer in report.ranking] == by_bound
    for layer in report.layers:
        assert layer.dampening_frac == 0.0
        assert layer.cca_bound == pytest.approx(bounds[layer.index], rel=TOLERANCE)
        seen = plain[LAYERS.index(layer.index)]
        X, A = seen.residual, seen.output
        W, b = assert_map(model, layer.index, X, A, TOLERANCE)
        nmse = oracle.nmse(X, A, W, b, np.float64)
        assert layer.nmse == pytest.approx(nmse, rel=TOLERANCE)
