# SPDX-License-Identifier: Apache-2.0
"""NBLModifier through real oneshot(): the right maps in the right layers, one pass."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import DiskCache
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.recipe import Recipe
from loguru import logger
from torch import nn

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.numerics.products import FastProducts
from nbl_modifier.records.compression import NBLReport
from tests.numerics import oracle
from tests.tiny_llama import (
    DEMO_MODEL,
    FOUR_BITS,
    Model,
    compress,
    demo_tokenizer,
    linearized,
    load,
    load_on_disk,
    logits_of,
    tensors_in,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Kind = Literal["residual", "normalized"]
INPUTS = pytest.mark.parametrize("kind", ["residual", "normalized"])
# W is rounded to float32: 2^-24 = 6e-8 of each entry. Before that it is the float64
# solution of the same activations, bit for bit, whose own error is below 1e-16 times
# the condition number, here 1e3. Left to spare: other orders of summation.
ROUNDED = 1e-7


@dataclass(frozen=True)
class Activations:
    """
    What one attention layer sees and does, float64 rows ``[num_tokens, hidden_size]``.

    :param residual: R
    :param normalized: norm(R)
    :param output: A
    """

    residual: np.ndarray
    normalized: np.ndarray
    output: np.ndarray

    def inputs(self, kind: str) -> np.ndarray:
        return self.residual if kind == "residual" else self.normalized

    @property
    def bound(self) -> float:
        return oracle.nmse_bound(self.residual, self.residual + self.output)


def activations(
    folder: Path,
    rows: Dataset,
    masks: list[list[int]] | None = None,
    indices: list[int] | None = None,
) -> list[Activations]:
    """
    Return each layer's activations in a plain forward pass, row by row.

    :param folder: a model
    :param rows: tokens
    :param masks: nonzero where a token counts, per row; None: all count
    :param indices: the layers to return, in this order; None: all
    """
    model = load(folder)
    seen: list[dict[str, list[np.ndarray]]] = []
    keep = torch.tensor(0)

    def take(values: torch.Tensor) -> np.ndarray:
        return values[0, keep].double().numpy()

    layers = model.model.layers
    for layer in layers if indices is None else [layers[i] for i in indices]:
        found: dict[str, list[np.ndarray]] = {"R": [], "X": [], "A": []}

        def see_norm(_: nn.Module, args: Any, output: Any, found: Any = found) -> None:
            found["R"].append(take(args[0]))
            found["X"].append(take(output))

        def see_attention(
            _: nn.Module, __: Any, output: Any, found: Any = found
        ) -> None:
            found["A"].append(take(output[0]))

        layer.input_layernorm.register_forward_hook(see_norm)
        layer.self_attn.register_forward_hook(see_attention)
        seen.append(found)
    for number, tokens in enumerate(rows["input_ids"]):
        counts = masks[number] if masks is not None else [1] * len(tokens)
        keep = torch.tensor(counts).nonzero().flatten()
        # on a CPU without bfloat16 rounded as in the run, which is compared bit for bit
        with torch.no_grad(), FastProducts():
            model.model(torch.tensor([tokens]), use_cache=False)
    return [Activations(*map(np.concatenate, found.values())) for found in seen]


def assert_map(
    model: Model, index: int, X: np.ndarray, Y: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Assert that a layer of ``model`` is the LMMSE map from X to Y; return that."""
    linear = model.model.layers[index].self_attn.linear
    W, b = oracle.lmmse(X, Y)
    weight = linear.weight.detach().double().numpy()
    assert np.linalg.norm(weight - W) <= tolerance * np.linalg.norm(W)
    # The bias belongs to the rounded weight, so it is compared through the mean output.
    mean = weight @ X.mean(0) + linear.bias.detach().double().numpy()
    scale = np.linalg.norm(b) + np.linalg.norm(W) * np.linalg.norm(X.mean(0))
    assert np.linalg.norm(mean - Y.mean(0)) <= tolerance * scale
    return W, b


def gptq(**fields: Any) -> GPTQModifier:
    return GPTQModifier(
        config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"], **fields
    )


def run(
    folder: Path, recipe: Any, rows: Dataset, **kwargs: Any
) -> tuple[Model, NBLReport]:
    """Run oneshot() with an NBLModifier, alone or first in a list."""
    model = compress(load(folder), recipe, rows, **kwargs)
    modifier = recipe[0] if isinstance(recipe, list) else recipe
    assert modifier.report is not None
    return model, modifier.report


@pytest.fixture(scope="module")
def plain(llama: Path, rows: Dataset) -> list[Activations]:
    return activations(llama, rows)


# --- what it computes ----------------------------------------------------------------


@INPUTS
def test_maps_equal_an_independent_computation(
    llama: Path, rows: Dataset, plain: list[Activations], kind: Kind
) -> None:
    model, report = run(llama, NBLModifier(num_layers=4, input=kind), rows)
    assert report.num_tokens == 16 * 64
    assert linearized(model) == [0, 1, 2, 3]
    for index, seen in enumerate(plain):
        assert_map(model, index, seen.inputs(kind), seen.output, ROUNDED)


def test_ranking_by_nmse(llama: Path, rows: Dataset, plain: list[Activations]) -> None:
    def nmse(index: int) -> float:
        X, A = plain[index].residual, plain[index].output
        return oracle.nmse(X, A, *oracle.lmmse(X, A))

    by_nmse = sorted(range(4), key=nmse)
    # otherwise this test could not tell the criteria apart
    assert by_nmse != sorted(range(4), key=lambda index: plain[index].bound)
    recipe = NBLModifier(num_layers=2, criterion="nmse")
    model, report = run(llama, recipe, rows)
    assert [layer.index for layer in report.ranking] == by_nmse
    assert linearized(model) == report.selected_layers == sorted(by_nmse[:2])
    assert model.config.nbl_config["criterion"] == "nmse"


def test_trained_model_in_bfloat16() -> None:
    """Real weights and text: ill-conditioned activations, rounded to 8 bits."""
    texts = stdlib_texts("calibration")
    windows = pack(texts, demo_tokenizer(), seq_length=128, num_sequences=20)
    model, report = run(DEMO_MODEL, NBLModifier(num_layers=4), windows)
    plain = activations(DEMO_MODEL, windows)
    bounds = [seen.bound for seen in plain]
    assert [layer.index for layer in report.ranking] == list(np.argsort(bounds))
    for layer in report.layers:
        assert layer.cca_bound == pytest.approx(bounds[layer.index], rel=1e-6)
    assert linearized(model) == report.selected_layers == sorted(np.argsort(bounds)[:4])
    for index in report.selected_layers:
        assert model.model.layers[index].self_attn.linear.weight.dtype == torch.bfloat16
        # bfloat16 has 8 bits: entries of W are off by 2^-9 of themselves at most.
        seen = plain[index]
        assert_map(model, index, seen.residual, seen.output, 2**-9)


def test_paper_mode_is_the_papers_algorithms_on_a_trained_model(
    tmp_path: Path,
) -> None:
    """W, b, bounds and ranking of every layer, to 1e-6: Algorithms 1 and 2 in scipy."""
    # float32, since the checkpoint's bfloat16 rounds W to three digits
    load(DEMO_MODEL).float().save_pretrained(tmp_path / "model")
    texts = stdlib_texts("calibration")
    windows = pack(texts, demo_tokenizer(), seq_length=128, num_sequences=24)
    model, report = run(tmp_path / "model", NBLModifier(num_layers=16), windows)
    plain = activations(tmp_path / "model", windows)
    bounds = [seen.bound for seen in plain]
    assert [layer.index for layer in report.ranking] == list(np.argsort(bounds))
    assert linearized(model) == list(range(16))
    for layer in report.layers:
        assert layer.cca_bound == pytest.approx(bounds[layer.index], rel=1e-6)
        seen = plain[layer.index]
        W, b = assert_map(model, layer.index, seen.residual, seen.output, 1e-6)
        # b = E[y] - W E[x] is a difference: 1e-6 of its terms
        linear = model.model.layers[layer.index].self_attn.linear
        terms = np.linalg.norm(seen.output.mean(0))
        terms += np.linalg.norm(W) * np.linalg.norm(seen.residual.mean(0))
        bias = linear.bias.detach().double().numpy()
        assert np.linalg.norm(bias - b) <= 1e-6 * terms


def test_dampening_is_added_to_the_covariance(
    llama: Path, rows: Dataset, plain: list[Activations]
) -> None:
    recipe = NBLModifier(layers=[1], dampening_frac=0.1)
    model, report = run(llama, recipe, rows)
    X, A = plain[1].residual, plain[1].output
    ridge = 0.1 * oracle.moments(X, A).cov_xx.trace() / 32
    W, _ = oracle.lmmse(X, A, np.full(32, ridge))
    weight = model.model.layers[1].self_attn.linear.weight.detach().double().numpy()
    assert np.linalg.norm(weight - W) <= ROUNDED * np.linalg.norm(W)
    assert report.dampening_frac == 0.1
    assert report.layers[0].dampening_frac == pytest.approx(0.1)


# --- recipes --------------------------------------------------------------------------

YAML = "default_stage: {default_modifiers: {NBLModifier: {num_layers: 2}}}"


def weights(model: Model) -> dict[str, torch.Tensor]:
    """Return the maps of a model, its own copy."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith((".self_attn.linear.weight", ".self_attn.linear.bias"))
    }


def assert_same_weights(model: Model, other: Model) -> None:
    mine, theirs = weights(model), weights(other)
    assert mine.keys() == theirs.keys()
    assert mine
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_all_forms_of_a_recipe_do_the_same(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(YAML)
    expected, _ = run(llama, NBLModifier(num_layers=2), rows)
    for recipe in (
        YAML,
        str(tmp_path / "recipe.yaml"),
        [NBLModifier(num_layers=2)],
        Recipe.create_instance([NBLModifier(num_layers=2)]),
        Recipe.create_instance(YAML),
    ):
        assert_same_weights(compress(load(llama), recipe, rows), expected)


# --- one pass, one layer at a time ----------------------------------------------------


@pytest.mark.parametrize("recipe", ["nbl", "nbl+gptq"])
def test_replaced_attention_is_freed(llama: Path, rows: Dataset, recipe: str) -> None:
    model = load(llama)
    old = [weakref.ref(layer.self_attn) for layer in model.model.layers]
    modifiers = [NBLModifier(layers=[0, 2]), *([gptq()] if "gptq" in recipe else [])]
    compress(model, modifiers, rows)
    gc.collect()
    assert [ref() is None for ref in old] == [True, False, True, False]


# --- large models ---------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["nbl", "nbl+gptq"])
def test_model_that_is_mostly_on_disk(
    llama: Path,
    rows: Dataset,
    tmp_path: Path,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = 20_000  # bytes; a file is in memory while it is written
    place = "nbl_modifier.llmcompressor_plugin.saving._SHARD_BYTES"
    monkeypatch.setattr(place, shard)

    def modifiers() -> list[Modifier]:
        return [NBLModifier(layers=[1, 3]), *([gptq()] if "gptq" in recipe else [])]

    expected, _ = run(llama, modifiers(), rows)
    model = load_on_disk(llama, tmp_path / "offload")
    compress(model, modifiers(), rows)
    for index in (1, 3):
        linear = model.model.layers[index].self_attn.linear
        assert isinstance(linear._parameters, DiskCache)
        with disable_onloading():
            assert linear.weight.device.type == "meta"
    assert_same_weights(model, expected)
    logits = logits_of(model)
    model.save_pretrained(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) < 2 * shard
    nbl_modifier.hf.register()
    assert torch.equal(logits_of(load(tmp_path / "out")), logits)


# --- with a quantizer -----------------------------------------------------------------


@contextlib.contextmanager
def warnings_of() -> Iterator[list[str]]:
    """Collect what is logged at level WARNING or above."""
    messages: list[str] = []
    sink = logger.add(
        lambda message: messages.append(str(message)),
        level="WARNING",
        # llm-compressor's own level for figures, above warnings
        filter=lambda record: record["level"].name != "METRIC",
    )
    try:
        yield messages
    finally:
        logger.remove(sink)


@INPUTS
def test_every_linear_is_quantized(
    llama: Path, rows: Dataset, tmp_path: Path, kind: Kind
) -> None:
    recipe = [NBLModifier(layers=[0, 2], input=kind), gptq()]
    with warnings_of() as messages:
        model = compress(load(llama), recipe, rows, output_dir=str(tmp_path / "out"))
    # llm-compressor says on any CPU-only machine that there is no accelerator
    assert [text for text in messages if "No accelerator" not in text] == []
    tensors = tensors_in(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = f"{name}.weight_packed" in tensors
            assert packed == (name != "lm_head"), name
            assert packed != (f"{name}.weight" in tensors), name
    for index in (0, 2):
        attention = f"model.layers.{index}.self_attn."
        found = {name for name in tensors if name.startswith(attention)}
        assert {name.removeprefix(f"{attention}linear.") for name in found} == {
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "bias",
        }
        norm = f"model.layers.{index}.input_layernorm.weight"
        assert (norm in tensors) == (kind == "normalized")


def test_quantized_weights_are_those_of_the_maps(llama: Path, rows: Dataset) -> None:
    dense, _ = run(llama, NBLModifier(layers=[0, 2]), rows)
    model, _ = run(llama, [NBLModifier(layers=[0, 2]), gptq()], rows)
    expected = weights(dense)
    for name, tensor in weights(model).items():
        if name.endswith("bias"):
            assert torch.equal(tensor, expected[name])
            continue
        # 15 levels over the range of a group of 32 weights: a step is at most a
        # seventh of the largest. GPTQ moves weights by more than half a step to make
        # up for each other's errors, the more the more inputs correlate.
        steps = (tensor - expected[name]).abs() / (
            expected[name].unflatten(1, (-1, 32)).abs().amax(-1) / 7
        ).repeat_interleave(32, dim=1)
        assert steps.median() < 1
        assert not torch.equal(tensor, expected[name])


# --- failures -------------------------------------------------------------------------
