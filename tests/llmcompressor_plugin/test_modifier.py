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
import yaml
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache import DiskCache
from datasets import Dataset
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.recipe import Recipe
from loguru import logger
from torch import nn

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import pack, stdlib_texts
from nbl_modifier.hf.modeling_nbl import LinearizedAttention
from nbl_modifier.layer_statistics.moments import LayerStatistics
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
    ragged_rows,
    save_llama,
    tensors_in,
    token_rows,
)
from tests.tiny_models import save_tiny

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
            model(torch.tensor([tokens]), use_cache=False)
    return [Activations(*map(np.concatenate, found.values())) for found in seen]


def assert_map(
    model: Model, index: int, X: np.ndarray, Y: np.ndarray, tolerance: float
) -> None:
    """Assert that layer ``index`` of ``model`` is the LMMSE map from X to Y."""
    linear = model.model.layers[index].self_attn.linear
    W, b = oracle.lmmse(X, Y)
    weight = linear.weight.detach().double().numpy()
    assert np.linalg.norm(weight - W) <= tolerance * np.linalg.norm(W)
    # The bias belongs to the rounded weight, so it is compared through the mean output.
    mean = weight @ X.mean(0) + linear.bias.detach().double().numpy()
    scale = np.linalg.norm(b) + np.linalg.norm(W) * np.linalg.norm(X.mean(0))
    assert np.linalg.norm(mean - Y.mean(0)) <= tolerance * scale


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


@INPUTS
def test_report_equals_an_independent_computation(
    llama: Path, rows: Dataset, plain: list[Activations], kind: Kind
) -> None:
    _, report = run(llama, NBLModifier(num_layers=1, input=kind), rows)
    assert [layer.index for layer in report.ranking] == sorted(
        range(4), key=lambda index: plain[index].bound
    )
    for layer in report.layers:
        seen = plain[layer.index]
        # Bound and NMSE are those of the float64 solution; 1e-9 leaves 1e-16 times the
        # condition number of 1e3 room for the orders of summation.
        assert layer.cca_bound == pytest.approx(seen.bound, rel=1e-9)
        assert layer.score == layer.cca_bound
        X, A = seen.inputs(kind), seen.output
        nmse = oracle.nmse(X, A, *oracle.lmmse(X, A))
        assert layer.nmse == pytest.approx(nmse, rel=1e-9)
        total = np.var(seen.residual + A, axis=0).sum()
        assert layer.residual_nmse == pytest.approx(
            nmse * np.var(A, axis=0).sum() / total, rel=1e-9
        )
        assert layer.dampening_frac == 0.0
        assert layer.num_tokens == len(X)


@INPUTS
def test_canonical_correlations_are_stored_on_request(
    llama: Path, rows: Dataset, plain: list[Activations], kind: Kind
) -> None:
    """Those that the bound is the sum of, whatever the linear layer reads."""
    recipe = NBLModifier(num_layers=1, input=kind, canonical_correlations=True)
    _, report = run(llama, recipe, rows)
    for layer in report.layers:
        seen = plain[layer.index]
        rho = oracle.canonical_correlations(seen.residual, seen.residual + seen.output)
        expected = np.quantile(rho, np.linspace(0, 1, 21))
        assert layer.canonical_correlations == pytest.approx(expected, abs=1e-9)
    _, report = run(llama, NBLModifier(num_layers=1, input=kind), rows)
    assert [layer.canonical_correlations for layer in report.layers] == [None] * 4


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
        assert_map(model, layer.index, seen.residual, seen.output, 1e-6)
        W, b = oracle.lmmse(seen.residual, seen.output)
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


# --- which layers ---------------------------------------------------------------------


def test_named_layers_are_the_only_ones_measured(llama: Path, rows: Dataset) -> None:
    model, report = run(llama, NBLModifier(layers=[3, 1]), rows)
    assert linearized(model) == report.selected_layers == [1, 3]
    assert {layer.index for layer in report.layers} == {1, 3}


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({"targets": ["LlamaAttention"]}, [0, 1, 2, 3]),
        ({"targets": [r"re:.*layers\.[12]\.self_attn$"]}, [1, 2]),
        ({"targets": ["model.layers.2.self_attn"]}, [2]),
        ({"ignore": [r"re:.*layers\.[03]\..*"]}, [1, 2]),
        ({"ignore": ["model.layers.2.self_attn"]}, [0, 1, 3]),
        (
            {
                "targets": ["re:.*self_attn"],
                "ignore": [r"re:.*layers\.0", "model.layers.3.self_attn"],
            },
            [1, 2],
        ),
    ],
)
def test_targets_and_ignore(
    llama: Path, rows: Dataset, fields: dict[str, Any], measured: list[int]
) -> None:
    model, report = run(llama, NBLModifier(num_layers=1, **fields), rows)
    assert sorted(layer.index for layer in report.layers) == measured
    assert linearized(model) == [report.ranking[0].index]


@pytest.mark.parametrize(("reduction", "count"), [(0.01, 1), (0.5, 2), (0.51, 3)])
def test_kv_cache_reduction_is_a_number_of_layers(
    llama: Path, rows: Dataset, reduction: float, count: int
) -> None:
    model, report = run(llama, NBLModifier(kv_cache_reduction=reduction), rows)
    by_count, _ = run(llama, NBLModifier(num_layers=count), rows)
    assert linearized(model) == linearized(by_count)
    assert report.num_replaced == count
    assert f"kv_cache_reduction={reduction}" in report.layers[0].reason
    assert report.kv_cache_fraction == 1 - count / 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sliding layers and three with full attention, in turns."""
    folder = tmp_path_factory.mktemp("gemma") / "base"
    return save_tiny(folder, "gemma2", num_layers=6)


@pytest.mark.parametrize(
    ("selection", "criterion"),
    [("one_shot", "cca_bound"), ("greedy", "nmse"), ("greedy", "kl")],
)
def test_kv_cache_reduction_takes_layers_of_the_kind_that_frees_most(
    gemma: Path, rows: Dataset, selection: Any, criterion: Any
) -> None:
    """Of 3 x (16 + 17) blocks three full layers take 3 x 16, sliding ones 3 x 17."""
    nbl = NBLModifier(kv_cache_reduction=0.5, selection=selection, criterion=criterion)
    model, report = run(gemma, nbl, rows)
    assert [layer.index for layer in report.ranking][:3] != [0, 2, 4]
    assert linearized(model) == [0, 2, 4]
    assert report.kv_cache_context == 256
    assert report.kv_cache_fraction == pytest.approx(48 / 99)
    (other,) = {layer.reason for layer in report.layers if layer.index == 5}
    assert "no more with full attention" in other or selection == "greedy"


def test_layers_that_free_no_kv_cache_are_told(
    gemma: Path, rows: Dataset, logged: list[str]
) -> None:
    """2 x (16 + 2 x 17) blocks for sequences of 256 tokens, 3 x (16 + 17) before."""
    _, report = run(gemma, NBLModifier(layers=[1]), rows)
    assert report.kv_cache_fraction == pytest.approx(100 / 99)
    assert report.kv_cache_subject == "KV cache of a sequence of 256 tokens"
    (said,) = [text for text in logged if "frees no KV cache" in text]
    assert "layers [1]" in said
    assert "1.010 times" in said


def test_ignore_that_matches_nothing_is_said(llama: Path, rows: Dataset) -> None:
    with warnings_of() as messages:
        run(llama, NBLModifier(num_layers=1, ignore=["re:.*no_such"]), rows)
    assert any("ignore" in text and "no_such" in text for text in messages)


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


def test_saved_recipe_replays(rows: Dataset, tmp_path: Path) -> None:
    # W4A16 has groups of 128 weights
    llama = save_llama(tmp_path / "model", num_layers=3, hidden_size=128)
    recipe = [
        NBLModifier(
            num_layers=2,
            targets=["LlamaAttention"],
            ignore=["re:.*layers.0.*"],
            criterion="nmse",
            input="normalized",
            dampening_frac=0.01,
        ),
        GPTQModifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"]),
    ]
    compress(load(llama), recipe, rows, output_dir=str(tmp_path / "first"))
    saved = tmp_path / "first" / "recipe.yaml"
    fields = yaml.safe_load(saved.read_text())["default_stage"]["default_modifiers"]
    assert fields["NBLModifier"] == {
        "num_layers": 2,
        "targets": ["LlamaAttention"],
        "ignore": ["re:.*layers.0.*"],
        "criterion": "nmse",
        "selection": "one_shot",
        "refit": False,
        "distill_epochs": 0,
        "kind": "attention",
        "method": "linear",
        "estimator": "lmmse",
        "input": "normalized",
        "dampening_frac": 0.01,
        "canonical_correlations": False,
    }
    compress(load(llama), str(saved), rows, output_dir=str(tmp_path / "second"))
    first, second = (tensors_in(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (tmp_path / "second" / "recipe.yaml").read_text() == saved.read_text()


# --- padding and masks ----------------------------------------------------------------

LENGTHS = [64, 40, 7, 55, 64, 21, 30, 48, 3, 64, 33, 59, 12, 61, 26, 44]


@INPUTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(llama: Path, side: str, kind: Kind) -> None:
    ragged = ragged_rows(LENGTHS)
    single, _ = run(llama, NBLModifier(num_layers=4, input=kind), ragged)
    batched, report = run(
        llama,
        NBLModifier(num_layers=4, input=kind),
        ragged,
        batch_size=4,
        data_collator="padding",
        # or oneshot cuts the rows to its default of 384 tokens and warns
        max_seq_length=None,
        processor=demo_tokenizer(padding_side=side),
    )
    assert report.num_tokens == sum(LENGTHS)
    expected = weights(single)
    for name, tensor in weights(batched).items():
        # Left padding shifts positions, and rotary angles and activations with them by
        # float32 rounding: 4e-7 in W as measured. Were padding counted, above 1e-2.
        error = torch.linalg.norm(tensor - expected[name])
        assert error <= 5e-6 * torch.linalg.norm(expected[name]), name


def test_tokens_outside_the_loss_do_not_count(llama: Path, rows: Dataset) -> None:
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(16, 64, generator=generator) < 0.6).long().tolist()
    masked = rows.add_column("loss_mask", masks)
    model, report = run(llama, NBLModifier(num_layers=4), masked, use_loss_mask=True)
    assert report.num_tokens == sum(map(sum, masks))
    for index, seen in enumerate(activations(llama, rows, masks)):
        assert_map(model, index, seen.residual, seen.output, ROUNDED)


# --- one pass, one layer at a time ----------------------------------------------------


def count_calls(model: Model) -> list[int]:
    """Return a list that grows by one with each forward pass of the last layer."""
    calls: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("kwargs", "of_gptq"),
    # GPTQ runs every layer twice, to propagate its error, unless it is told not to
    [({}, 2), ({"propagate_error": False}, 1)],
)
def test_nbl_passes_the_data_once(
    llama: Path, rows: Dataset, kwargs: dict[str, Any], of_gptq: int
) -> None:
    model = load(llama)
    calls = count_calls(model)
    compress(model, NBLModifier(num_layers=1), rows, **kwargs)
    assert len(calls) == len(rows)
    model = load(llama)
    calls = count_calls(model)
    compress(model, [NBLModifier(num_layers=1), gptq()], rows, **kwargs)
    assert len(calls) == (1 + of_gptq) * len(rows)


@pytest.mark.parametrize(("pipeline", "peak"), [("independent", 1), ("basic", 4)])
def test_statistics_are_freed_layer_by_layer(
    llama: Path,
    rows: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: str,
    peak: int,
) -> None:
    alive: weakref.WeakSet[LayerStatistics] = weakref.WeakSet()
    counts = []
    original = LayerStatistics.__init__

    def counted(self: LayerStatistics, *args: Any) -> None:
        original(self, *args)
        alive.add(self)
        counts.append(len(alive))

    monkeypatch.setattr(LayerStatistics, "__init__", counted)
    run(llama, NBLModifier(num_layers=2), rows, pipeline=pipeline)
    assert len(counts) == 4  # one per layer, not one per batch
    assert max(counts) == peak
    gc.collect()
    assert not alive


def test_basic_pipeline_gives_the_same_maps(llama: Path, rows: Dataset) -> None:
    expected, _ = run(llama, NBLModifier(num_layers=2), rows)
    model, _ = run(llama, NBLModifier(num_layers=2), rows, pipeline="basic")
    assert_same_weights(model, expected)


def test_only_the_maps_that_may_be_chosen_are_kept(
    llama: Path, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All maps of an 80-layer model would take 20 GB."""
    from nbl_modifier.calibration.calibration import Calibration

    counts = []
    original = Calibration.solve_finished

    def counted(self: Calibration, modules: Any) -> None:
        original(self, modules)
        counts.append(len(self.replacements))

    monkeypatch.setattr(Calibration, "solve_finished", counted)
    run(llama, NBLModifier(num_layers=2), rows)
    assert max(counts) == 2


@pytest.mark.parametrize("recipe", ["nbl", "nbl+gptq"])
def test_replaced_attention_is_freed(llama: Path, rows: Dataset, recipe: str) -> None:
    model = load(llama)
    old = [weakref.ref(layer.self_attn) for layer in model.model.layers]
    modifiers = [NBLModifier(layers=[0, 2]), *([gptq()] if "gptq" in recipe else [])]
    compress(model, modifiers, rows)
    gc.collect()
    assert [ref() is None for ref in old] == [True, False, True, False]


def test_no_hooks_stay(llama: Path, rows: Dataset) -> None:
    model, _ = run(llama, NBLModifier(num_layers=2), rows)
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name


def test_training_mode_and_attention_implementation_come_back(
    llama: Path, rows: Dataset
) -> None:
    model = load(llama).train()
    implementation = model.config._attn_implementation
    compress(model, NBLModifier(num_layers=2), rows)
    assert {module.training for module in model.modules()} == {True}
    assert model.config._attn_implementation == implementation


def test_data_of_later_passes_does_not_depend_on_the_checks(
    llama: Path, rows: Dataset
) -> None:
    """Shuffled loaders draw from torch's generator each time they are iterated."""

    class Draw(Modifier):
        """Notes the generator's next number where its calibration would start."""

        def on_initialize(self, state: State, **kwargs: Any) -> bool:
            drawn.append(torch.random.get_rng_state().sum().item())
            return True

        def on_finalize(self, state: State, **kwargs: Any) -> bool:
            return True

    drawn: list[float] = []
    torch.manual_seed(0)
    recipe = [NBLModifier(num_layers=1), Draw()]
    compress(load(llama), recipe, rows, shuffle_calibration_samples=True)
    torch.manual_seed(0)
    compress(load(llama), Draw(), rows, shuffle_calibration_samples=True)
    assert drawn[0] == drawn[1]


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


class Failing(GPTQModifier):
    """A quantizer that fails on the second layer, as an out-of-memory error would."""

    def on_sequential_epoch_end(self, state: State, *args: Any, **kwargs: Any) -> None:
        if isinstance(state.model.model.layers[1].self_attn, LinearizedAttention):
            raise RuntimeError("out of memory")
        super().on_sequential_epoch_end(state, *args, **kwargs)


def failing() -> Failing:
    return Failing(config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"])


def test_model_of_a_failed_run_is_saved_as_what_it_is(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = load(llama)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress(
            model,
            [NBLModifier(layers=[1]), failing()],
            rows,
            output_dir=str(tmp_path / "never"),
        )
    assert list(tmp_path.iterdir()) == []
    for name, packed in (("dense", False), ("quantized", True)):
        model.save_pretrained(tmp_path / name, save_compressed=packed)
        assert (tmp_path / name / "nbl_report.json").exists()
    nbl_modifier.hf.register()
    saved = load(tmp_path / "quantized")
    assert type(saved).__name__ == "NBLLlamaForCausalLM"
    assert linearized(saved) == [1]
    # The scales of layers that GPTQ did not reach are anything; the dense checkpoint
    # holds the weights that quantization began on.
    expected, _ = run(llama, NBLModifier(layers=[1]), rows)
    tensors = tensors_in(tmp_path / "dense")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


def test_next_run_after_a_failed_one(llama: Path, rows: Dataset) -> None:
    failed = load(llama)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress(failed, [NBLModifier(layers=[1]), failing()], rows)
    expected, _ = run(llama, NBLModifier(layers=[0, 2]), rows)
    # The failed run's modifiers were finalized on the way.
    assert failed.config.model_type == "nbl_llama"
    model, report = run(llama, [NBLModifier(layers=[0, 2]), gptq()], rows)
    assert report.selected_layers == [0, 2]
    assert model.config.model_type == "nbl_llama"
    assert linearized(expected) == [0, 2]
    # and the failed model is what it says
    with pytest.raises(ValueError, match="quantized already"):
        compress(failed, NBLModifier(layers=[0]), rows)


def test_same_model_after_a_run_that_failed_in_calibration(
    llama: Path, rows: Dataset
) -> None:
    expected, _ = run(llama, NBLModifier(num_layers=2), rows)
    model = load(llama)
    weight = model.model.layers[2].self_attn.v_proj.weight
    good = weight.detach().clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
        compress(model, NBLModifier(num_layers=2), rows)
    assert linearized(model) == []
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.copy_(good)
    compress(model, NBLModifier(num_layers=2), token_rows())
    assert_same_weights(model, expected)
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
