# SPDX-License-Identifier: Apache-2.0
"""A linearized checkpoint goes through another oneshot() like any model."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import disable_quantization
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.recipe import Recipe
from torch import nn
from transformers import PreTrainedModel

from nbl_modifier import NBLModifier
from nbl_modifier.records.compression import NBLReport
from tests.followers import FAMILIES, FOLLOWERS, Kind, TinyModels, quantizer
from tests.tiny_llama import compress, linearized, load, logits_of, tensors_in

pytestmark = pytest.mark.usefixtures("one_thread", "pageable_cache")

RECIPES = ("gptq", "awq", "smoothquant_w8a8", "fp8")
KINDS = pytest.mark.parametrize("kind", ["residual", "normalized"])


@pytest.fixture(scope="module")
def checkpoints(
    tiny_models: TinyModels, rows: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return a function that returns a checkpoint with layers 0 and 2 linearized."""
    made: dict[Any, Path] = {}

    def look_up(family: str = "llama", kind: Kind = "residual") -> Path:
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"{family}-{kind}"
            recipe = NBLModifier(layers=[0, 2], input=kind)
            compress(load(tiny_models(family)), recipe, rows, output_dir=str(folder))
            made[family, kind] = folder
        return made[family, kind]

    return look_up


def assert_checkpoint(folder: Path, model: PreTrainedModel, layers: list[int]) -> Any:
    """Assert that ``folder`` holds all of ``model``; return its config."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"].startswith("nbl_")
    assert config["architectures"] == [type(model).__name__]
    assert list(config["nbl_config"]["layers"]) == list(map(str, layers))
    names = {"README.md", "nbl_report.json", "recipe.yaml", "tokenizer.json"}
    assert names <= {path.name for path in folder.iterdir()}
    reloaded = load(folder)
    assert linearized(reloaded) == linearized(model) == layers
    assert torch.equal(logits_of(reloaded), logits_of(model))
    return config


def assert_quantized(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert hasattr(module, "quantization_scheme") == (name != "lm_head"), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
@KINDS
def test_saved_checkpoint_is_quantized(
    checkpoints: Any,
    rows: Dataset,
    tmp_path: Path,
    family: str,
    recipe: str,
    kind: Kind,
) -> None:
    source, out = checkpoints(family, kind), tmp_path / "out"
    model = compress(source, FOLLOWERS[recipe].make(), rows, output_dir=str(out))
    assert_quantized(model)
    config = assert_checkpoint(out, model, [0, 2])
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    # the same as in one recipe, but for the rounding of what is saved in between: none
    assert {layer["input"] for layer in config["nbl_config"]["layers"].values()} == {
        kind
    }
    before, after = (NBLReport.load(path / "nbl_report.json") for path in (source, out))
    assert after.layers == before.layers
    assert after.model == before.model
    assert after.recipe == (out / "recipe.yaml").read_text()


def test_result_is_that_of_one_recipe(
    checkpoints: Any, tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    for recipe in RECIPES:
        one, two = tmp_path / f"one-{recipe}", tmp_path / f"two-{recipe}"
        modifiers = [NBLModifier(layers=[0, 2]), *FOLLOWERS[recipe].make()]
        compress(load(tiny_models("llama")), modifiers, rows, output_dir=str(one))
        followers = FOLLOWERS[recipe].make()
        compress(checkpoints(), followers, rows, output_dir=str(two))
        expected, found = tensors_in(one), tensors_in(two)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("recipe", ["awq", "smoothquant_w8a8"])
@KINDS
def test_smoothing_a_checkpoint_is_an_identity(
    checkpoints: Any, rows: Dataset, recipe: str, kind: Kind
) -> None:
    expected = logits_of(load(checkpoints(kind=kind)))
    model = compress(checkpoints(kind=kind), FOLLOWERS[recipe].make(), rows)
    model.apply(disable_quantization)
    error = torch.linalg.norm(logits_of(model) - expected)
    assert error <= 1e-5 * torch.linalg.norm(expected)  # as in test_smoothing.py


def test_stages_of_two_runs_load_as_one_recipe(
    checkpoints: Any, rows: Dataset, tmp_path: Path
) -> None:
    """On disk or in memory in between; llm-compressor's own names load as nothing."""
    compress(
        checkpoints(),
        FOLLOWERS["gptq"].make(),
        rows,
        output_dir=str(tmp_path / "disk"),
    )
    model = compress(load(checkpoints()), [SmoothQuantModifier()], rows)
    compress(model, NBLModifier(layers=[1]), rows)
    compress(model, FOLLOWERS["gptq"].make(), rows, output_dir=str(tmp_path / "memory"))
    for name, expected in (
        ("disk", ["NBLModifier", "GPTQModifier"]),
        (
            "memory",
            ["NBLModifier", "SmoothQuantModifier", "NBLModifier", "GPTQModifier"],
        ),
    ):
        path = tmp_path / name / "recipe.yaml"
        modifiers = Recipe.create_instance(str(path)).modifiers
        assert [type(modifier).__name__ for modifier in modifiers] == expected
        stages = list(yaml.safe_load(path.read_text()))
        assert stages == [f"default_{i}_stage" for i in range(len(expected))]


# --- NBL again ------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [False, True])
def test_more_layers(
    checkpoints: Any, rows: Dataset, tmp_path: Path, in_memory: bool
) -> None:
    source, out = checkpoints(), tmp_path / "out"
    first = NBLReport.load(source / "nbl_report.json")
    model = load(source)
    if in_memory:
        compress(model, [SmoothQuantModifier()], rows)  # something that keeps it there
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = NBLModifier(num_layers=1, input="normalized", criterion="nmse")
    compress(model, recipe, rows, output_dir=str(out))
    report = recipe.report
    assert report is not None
    assert {layer.index for layer in report.layers} == {1, 3}
    (new,) = {layer.index for layer in report.layers if layer.selected}
    layers = sorted([0, 2, new])
    config = assert_checkpoint(out, model, layers)
    kinds = {i: layer["input"] for i, layer in config["nbl_config"]["layers"].items()}
    assert kinds == {"0": "residual", "2": "residual", str(new): "normalized"}
    # The maps of the first run are untouched.
    for index in (0, 2):
        for part in ("weight", "bias"):
            name = f"model.layers.{index}.self_attn.linear.{part}"
            assert torch.equal(model.state_dict()[name], before[name])
    saved = NBLReport.load(out / "nbl_report.json")
    assert saved.selected_layers == layers
    assert saved.kv_cache_fraction == 0.25
    assert saved.model == first.model
    assert saved.previous is not None
    assert saved.previous.layers == first.layers
    assert saved.previous.selected_layers == [0, 2]


@pytest.mark.parametrize("recipe", ["gptq", "awq", "smoothquant_w8a8"])
def test_more_layers_and_a_quantizer(
    checkpoints: Any, rows: Dataset, tmp_path: Path, recipe: str
) -> None:
    """Layers of both kinds, of which only one has a norm that can be smoothed."""
    plain = load(checkpoints())
    compress(plain, NBLModifier(layers=[3], input="normalized"), rows)
    expected = logits_of(plain)
    followers = FOLLOWERS[recipe].make()
    nbl = NBLModifier(layers=[3], input="normalized")
    out = tmp_path / "out"
    model = compress(checkpoints(), [nbl, *followers], rows, output_dir=str(out))
    assert_quantized(model)
    assert_checkpoint(out, model, [0, 2, 3])
    if FOLLOWERS[recipe].smooths:
        nbl = NBLModifier(layers=[3], input="normalized")
        model = compress(checkpoints(), [nbl, *FOLLOWERS[recipe].make()], rows)
        model.apply(disable_quantization)
        error = torch.linalg.norm(logits_of(model) - expected)
        assert error <= 1e-5 * torch.linalg.norm(expected)


def test_user_mappings_on_a_checkpoint(checkpoints: Any, rows: Dataset) -> None:
    mappings: list[tuple[Any, ...] | list[Any]] = [
        [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"]
    ]
    plain = load(checkpoints(kind="normalized"))
    compress(plain, NBLModifier(layers=[3], input="normalized"), rows)
    user = SmoothQuantModifier(mappings=mappings)
    model = compress(
        checkpoints(kind="normalized"),
        [
            NBLModifier(layers=[3], input="normalized"),
            user,
            quantizer(QuantizationModifier, "W8A8"),
        ],
        rows,
    )
    assert user.mappings == mappings
    model.apply(disable_quantization)
    expected = logits_of(plain)
    error = torch.linalg.norm(logits_of(model) - expected)
    assert error <= 1e-5 * torch.linalg.norm(expected)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        smoothed, norm = layer.input_layernorm.weight, other.input_layernorm.weight
        assert not torch.equal(smoothed, norm)


# --- what is left behind --------------------------------------------------------------


def test_manual_save_after_two_runs(
    checkpoints: Any, rows: Dataset, tmp_path: Path
) -> None:
    model = compress(checkpoints(), NBLModifier(layers=[1]), rows)
    compress(model, FOLLOWERS["w8a8"].make(), rows)
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert list(config["nbl_config"]["layers"]) == ["0", "1", "2"]
        assert not list((tmp_path / name).glob(".*"))
    once, twice = tensors_in(tmp_path / "once"), tensors_in(tmp_path / "twice")
    assert once.keys() == twice.keys()


def test_output_may_be_the_source(
    checkpoints: Any, rows: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    model = load(checkpoints())
    compress(model, [SmoothQuantModifier()], rows, output_dir=str(folder))
    model = compress(folder, FOLLOWERS["gptq"].make(), rows, output_dir=str(folder))
    assert_checkpoint(folder, model, [0, 2])


def test_checkpoint_without_report(
    checkpoints: Any, rows: Dataset, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    compress(load(checkpoints()), [SmoothQuantModifier()], rows, output_dir=str(source))
    (source / "nbl_report.json").unlink()
    compress(source, FOLLOWERS["w8a8"].make(), rows, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "nbl_report.json").exists()
    assert linearized(load(tmp_path / "out")) == [0, 2]
    recipe = NBLModifier(layers=[1])
    compress(source, recipe, rows, output_dir=str(tmp_path / "more"))
    report = NBLReport.load(tmp_path / "more" / "nbl_report.json")
    assert report.previous is None
    assert report.selected_layers == [0, 1, 2]


def test_models_are_freed(
    checkpoints: Any, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llm-compressor's tracer registers a namespace that holds the model with torch.fx
    # and leaves it there, NBL or not (0.14.0.1, pipelines/sequential/ast_helpers.py).
    monkeypatch.setattr(torch.fx._symbolic_trace, "_wrapped_fns_to_patch", {})
    model = compress(checkpoints(), NBLModifier(layers=[1]), rows)
    gone = weakref.ref(model)
    del model
    compress(checkpoints(), FOLLOWERS["w8a8"].make(), rows)  # resets the session
    torch.fx._symbolic_trace._wrapped_fns_to_patch.clear()
    gc.collect()
    assert gone() is None


def test_dense_models_are_saved_as_before(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    """Without NBL in recipe or model, llm-compressor's own saving is all there is."""
    out = tmp_path / "out"
    compress(
        load(tiny_models("llama")), FOLLOWERS["w8a8"].make(), rows, output_dir=str(out)
    )
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert not (out / "nbl_report.json").exists()
