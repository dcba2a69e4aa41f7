# SPDX-License-Identifier: Apache-2.0
"""Every kind and method of replacement, through real oneshot() runs and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nbl_modifier import Distill, NBLModifier
from nbl_modifier.records.compression import NBLReport
from tests.followers import TinyModels
from tests.llmcompressor_plugin.test_modifier import ROUNDED, activations
from tests.llmcompressor_plugin.test_smoothing import RECIPES
from tests.numerics import oracle
from tests.search.runs import FITTED, HELD_OUT, layer, mean_nll
from tests.tiny_llama import (
    FOUR_BITS,
    Model,
    compress,
    load,
    logits_of,
    save_llama,
    token_rows,
)
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

D = 32
# Fields of NBLModifier, all of which linearize or drop the layers 0 and 2 of 4.
METHODS: dict[str, dict[str, Any]] = {
    "low rank": {"rank": 8},
    "low rank behind the norm": {"rank": 0.5, "input": "normalized"},
    "attention drop": {"method": "drop"},
    "block": {"kind": "block"},
    "low-rank block": {"kind": "block", "rank": 8},
    "block drop": {"kind": "block", "method": "drop"},
    "wo_wv": {"method": "wo_wv", "input": "normalized"},
    "low-rank wo_wv": {"method": "wo_wv", "input": "normalized", "rank": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("methods") / "llama")


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return token_rows(16)


def run(
    folder: Path,
    rows: Dataset,
    *later: Modifier,
    out: Path | None = None,
    **fields: Any,
) -> tuple[Model, NBLReport]:
    modifier = NBLModifier(**fields)
    kwargs = {} if out is None else {"output_dir": str(out)}
    model = compress(load(folder), [modifier, *later], rows, **kwargs)
    assert modifier.report is not None
    return model.eval(), modifier.report


def generated(model: Model, **kwargs: Any) -> Tensor:
    tokens = torch.arange(2, 11)[None]
    output: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return output


@pytest.mark.parametrize("name", METHODS)
def test_saved_loaded_and_generated_from(
    folder: Path, rows: Dataset, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    model, report = run(folder, rows, out=out, layers=[0, 2], **METHODS[name])
    assert not torch.equal(logits_of(model), logits_of(load(folder)))
    loaded = load(out)
    assert torch.equal(logits_of(loaded), logits_of(model))
    expected = generated(loaded, use_cache=False)
    assert torch.equal(generated(loaded), expected)
    assert torch.equal(generated(loaded, cache_implementation="static"), expected)
    assert report.selected_layers == [0, 2]
    assert report.kv_cache_fraction == 0.5
    saved = NBLReport.load(out / "nbl_report.json")
    fields = {"kind": "attention", "method": "linear", "rank": None} | METHODS[name]
    # a report says apart what is put in place, and where it comes from
    weights = fields["method"] == "wo_wv"
    method = "linear" if weights else fields["method"]
    assert (saved.kind, saved.method) == (fields["kind"], method)
    assert saved.estimator == ("wo_wv" if weights else "lmmse")
    rank = fields["rank"]
    assert saved.rank == (16 if rank == 0.5 else rank)
    # What is saved replays.
    again = compress(load(folder), str(out / "recipe.yaml"), rows)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("name", METHODS)
def test_quantized_by_the_same_recipe(
    folder: Path, rows: Dataset, tmp_path: Path, name: str
) -> None:
    fields = dict(METHODS[name])
    if "rank" in fields:
        fields["rank"] = D  # groups of 32 fit nothing smaller
    quantizer = GPTQModifier(config_groups=FOUR_BITS, ignore=["lm_head"])
    out = tmp_path / "out"
    model, _ = run(folder, rows, quantizer, out=out, layers=[0, 2], **fields)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    unquantized = {
        n for n, m in linears.items() if getattr(m, "quantization_scheme", None) is None
    }
    assert unquantized == {"lm_head"}
    assert len(linears) > 5
    # packed and unpacked again: the same weights
    torch.testing.assert_close(
        logits_of(load(out)), logits_of(model), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("recipe", ["smoothquant", "awq"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("pageable_cache")
def test_smoothing_is_an_identity(
    tiny_models: TinyModels, rows: Dataset, name: str, recipe: str
) -> None:
    fields = METHODS[name] | {"layers": [0, 2]}
    if "rank" in fields:
        fields["rank"] = 128  # AWQ's scheme has groups of 128, and so has the model
    folder = tiny_models("llama")
    plain, _ = run(folder, rows, **fields)
    smoothed, _ = run(folder, rows, *RECIPES[recipe](), **fields)
    smoothed.apply(disable_quantization)
    error = (logits_of(smoothed) - logits_of(plain)).norm()
    # float32: 6e-8 per operation; 4 layers of a few hundred each
    assert error <= 1e-5 * logits_of(plain).norm()


# --- what is fitted -------------------------------------------------------------------


def block_streams(folder: Path, rows: Dataset, index: int) -> tuple[Any, Any]:
    """Return the residual stream before and after a block, float64 ``[tokens, d]``."""
    model = load(folder)
    before, after = [], []
    for tokens in rows["input_ids"]:
        with torch.no_grad():
            seen = model(
                torch.tensor([tokens]), output_hidden_states=True, use_cache=False
            ).hidden_states
        before.append(seen[index][0].double().numpy())
        after.append(seen[index + 1][0].double().numpy())
    return np.concatenate(before), np.concatenate(after)


def test_block_is_fitted_to_what_it_adds(folder: Path, rows: Dataset) -> None:
    index = 1
    before, after = block_streams(folder, rows, index)
    model, report = run(folder, rows, kind="block", layers=[index])
    W, b = oracle.lmmse(before, after - before)
    linear = model.model.layers[index].linear
    # the stream behind the block is a sum in float32, so what is added is rounded
    np.testing.assert_allclose(linear.weight, W, rtol=0, atol=2e-5 * np.abs(W).max())
    np.testing.assert_allclose(linear.bias, b, rtol=0, atol=2e-5 * np.abs(b).max())
    result = layer(report, index)
    assert result.name == "model.layers.1"
    added = after - before
    assert result.nmse == pytest.approx(oracle.nmse(before, added, W, b), rel=1e-5)
    bound = oracle.nmse_bound(before, after)
    assert result.cca_bound == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("kind", ["residual", "normalized"])
def test_low_rank_is_reduced_rank_regression(
    folder: Path, rows: Dataset, kind: str
) -> None:
    seen = activations(folder, rows)[2]
    model, report = run(folder, rows, layers=[2], rank=5, input=kind)
    W, b = oracle.reduced_rank(seen.inputs(kind), seen.output, 5)
    linear = model.model.layers[2].self_attn.linear
    product = linear.expand.weight.double() @ linear.reduce.weight.double()
    # both factors are rounded
    np.testing.assert_allclose(product, W, rtol=0, atol=20 * ROUNDED * np.abs(W).max())
    error = oracle.nmse(seen.inputs(kind), seen.output, W, b)
    assert layer(report, 2).nmse == pytest.approx(error, rel=1e-9)


def test_error_falls_with_rank(folder: Path, rows: Dataset) -> None:
    errors = []
    for rank in (1, 8, 24, D, None):
        _, report = run(folder, rows, layers=[1], rank=rank)
        errors.append(layer(report, 1).nmse)
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert errors[3] == pytest.approx(errors[4], rel=1e-10)


def test_weights_map_needs_no_data(folder: Path, rows: Dataset) -> None:
    fields: dict[str, Any] = {"method": "wo_wv", "input": "normalized"}
    model, report = run(folder, rows, layers=[2], **fields)
    attention = load(folder).model.layers[2].self_attn
    heads = attention.v_proj.weight.double().view(2, 1, 8, D)
    values = heads.expand(2, 2, 8, D).reshape(D, D)  # two query heads for each
    expected = (attention.o_proj.weight.double() @ values).detach()
    linear = model.model.layers[2].self_attn.linear
    torch.testing.assert_close(
        linear.weight.double(), expected, rtol=0, atol=ROUNDED * float(expected.max())
    )
    assert not linear.bias.any()
    other, _ = run(folder, token_rows(16, seed=5), layers=[2], **fields)
    assert torch.equal(other.model.layers[2].self_attn.linear.weight, linear.weight)
    seen = activations(folder, rows)[2]
    error = oracle.nmse(seen.normalized, seen.output, expected.numpy(), np.zeros(D))
    result = layer(report, 2)
    assert result.nmse == pytest.approx(error, rel=1e-9)
    # nothing was fitted, so there is no optimism to correct but that of the mean
    assert result.expected_nmse == pytest.approx(error, rel=5e-3)


def test_error_of_dropping_is_the_energy_of_attention(
    folder: Path, rows: Dataset
) -> None:
    seen = activations(folder, rows)
    _, report = run(
        folder, rows, method="drop", num_layers=2, criterion="residual_nmse"
    )
    energies = []
    for index, each in enumerate(seen):
        residual = each.residual + each.output
        variance = np.sum(oracle.centred(residual)[0] ** 2)
        energies.append(float(np.sum(each.output**2) / variance))
        result = layer(report, index)
        assert result.residual_nmse == pytest.approx(energies[-1], rel=1e-6)
    assert report.selected_layers == sorted(np.argsort(energies)[:2].tolist())


# --- dropped blocks -------------------------------------------------------------------


def test_shorter_checkpoint_is_a_stock_one(
    folder: Path, rows: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model, _ = run(folder, rows, out=out, kind="block", method="drop", layers=[0, 2])
    assert type(model) is LlamaForCausalLM
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 2
    assert config["nbl_dropped_blocks"] == [0, 2]
    assert not config.keys() & {"nbl_config", "auto_map"}
    assert not list(out.glob("*.py"))
    expected = load(folder).eval()
    del expected.model.layers[2], expected.model.layers[0]
    for index, kept in enumerate(expected.model.layers):
        kept.self_attn.layer_idx = index
    expected.config.num_hidden_layers = 2
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(loaded), logits_of(expected))
    # It may be written over, and be the start of another run.
    run(folder, rows, out=out, kind="block", method="drop", layers=[1])
    config = json.loads((out / "config.json").read_text())
    assert config["nbl_dropped_blocks"] == [1]
    again = tmp_path / "again"
    run(out, rows, out=again, kind="block", method="drop", layers=[1])
    config = json.loads((again / "config.json").read_text())
    assert config["nbl_dropped_blocks"] == [1, 2]
    assert config["num_hidden_layers"] == 2


def test_hybrid_model_keeps_the_kinds_of_its_layers(
    rows: Dataset, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", "gemma3_text")
    kinds = load(base).config.layer_types
    assert len(set(kinds)) == 2
    out = tmp_path / "out"
    model, _ = run(base, rows, out=out, kind="block", method="drop", layers=[1])
    loaded = load(out)
    assert loaded.config.layer_types == [kinds[0], *kinds[2:]]
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert torch.equal(generated(loaded), generated(loaded, use_cache=False))


@pytest.mark.parametrize("family", ["gemma3_text", "cohere", "granite", "qwen3_moe"])
@pytest.mark.parametrize("name", ["block", "attention drop", "low rank"])
def test_other_families(rows: Dataset, tmp_path: Path, family: str, name: str) -> None:
    base = save_tiny(tmp_path / "base", family)
    fields = dict(METHODS[name])
    if family == "cohere" and name == "low rank":
        fields["input"] = "normalized"
    out = tmp_path / "out"
    model, _ = run(base, rows, out=out, layers=[0, 2], **fields)
    loaded = load(out)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert torch.equal(generated(loaded), generated(loaded, use_cache=False))


def test_sleb_is_greedy_by_measured_loss(folder: Path) -> None:
    """Against block removal written out: all of them, best first, again."""
    rows = token_rows(16)
    held_out = rows.select(HELD_OUT)
    assert len(FITTED) + len(HELD_OUT) == 16

    def without(gone: list[int]) -> float:
        model = load(folder).eval()
        for index in sorted(gone, reverse=True):
            del model.model.layers[index]
        model.config.num_hidden_layers = 4 - len(gone)
        return mean_nll(model, held_out)

    expected: list[int] = []
    for _ in range(2):
        left = set(range(4)) - set(expected)
        expected.append(min(left, key=lambda index: without([*expected, index])))
    _, report = run(
        folder,
        rows,
        kind="block",
        method="drop",
        criterion="loss",
        selection="greedy",
        num_layers=2,
    )
    assert [result.index for result in report.ranking][:2] == expected
    assert report.heldout is not None
    perplexity = np.exp(without(expected))
    assert report.heldout.replaced == pytest.approx(perplexity, rel=1e-5)


# --- what goes together ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["start", "end", "update", "index", "initialized_"])
def test_fields_of_training_schedules_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no field {name}\. Its fields: num_layers"):
        NBLModifier(**dict[str, Any]({"num_layers": 1, name: 0}))


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_cache_reduction": True},
        {"num_layers": True},
        {"layers": [True]},
        {"max_nmse": True},
        {"num_layers": 1, "dampening_frac": False},
        {"num_layers": 1, "distill": True},
        {"num_layers": 1, "rank": True},
    ],
)
def test_booleans_are_not_numbers(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="true and false are no value") as caught:
        NBLModifier(**fields)
    assert list(fields)[-1] in str(caught.value)


def test_layers_with_the_preset_leave_nothing_to_choose(
    folder: Path, rows: Dataset, tmp_path: Path, logged: list[str]
) -> None:
    modifier = NBLModifier(layers=[0, 2], preset="best", distill=Distill(epochs=0))
    paper = NBLModifier(layers=[0, 2])
    assert (modifier.selection, modifier.criterion) == (
        paper.selection,
        paper.criterion,
    )
    assert modifier.input == "normalized"
    # as earlier versions saved it, with what the preset had filled in
    saved = NBLModifier(
        layers=[0, 2],
        preset="best",
        criterion="loss",
        selection="greedy",
        distill=Distill(epochs=0),
    )
    assert saved.model_dump() == modifier.model_dump()
    said = [text for text in logged if "is left out" in text]
    assert [text.partition(":")[0] for text in said] == [
        "NBLModifier.criterion",
        "NBLModifier.selection",
    ]


@pytest.mark.parametrize(
    ("fields", "input_"),
    [
        ({}, "normalized"),
        ({"rank": 8}, "normalized"),
        ({"kind": "block"}, "residual"),
        ({"method": "drop"}, "residual"),
        ({"method": "wo_wv"}, "normalized"),
        ({"method": "wo_wv", "input": "normalized"}, "normalized"),
    ],
)
def test_preset_fills_in_what_has_a_meaning(
    fields: dict[str, Any], input_: str
) -> None:
    modifier = NBLModifier(num_layers=2, preset="best", **fields)
    paper = NBLModifier(num_layers=2).criterion
    assert modifier.criterion != paper
    assert (modifier.input, modifier.refit) == (input_, False)
    assert (modifier.distill.epochs > 0) == (modifier.method != "drop")
