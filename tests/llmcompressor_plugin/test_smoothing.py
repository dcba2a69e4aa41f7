# SPDX-License-Identifier: Apache-2.0
"""Smoothing moves scales between modules; what the model computes stays the same."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.quantization import disable_quantization
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import Tensor
from transformers import PreTrainedModel

from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.llmcompressor_plugin.smoothing import MixedModel, rewrite_smoothquant
from tests.followers import (
    FAMILIES,
    FOLLOWERS,
    LAYER_SETS,
    Kind,
    TinyModels,
    quantizer,
    quip,
)
from tests.tiny_llama import compress, linearized, load
from tests.tiny_models import THOROUGH

pytestmark = pytest.mark.usefixtures("one_thread", "pageable_cache")

KINDS = ("residual", "normalized")
SETS = [*LAYER_SETS, [0, 1, 2, 3]]


def log_equalization() -> list[Modifier]:
    return [
        SmoothQuantModifier(algorithm="log_equalization"),
        quantizer(QuantizationModifier, "W8A8"),
    ]


RECIPES = {
    "awq": FOLLOWERS["awq"].make,
    "smoothquant": FOLLOWERS["smoothquant_w8a8"].make,
    "log_equalization": log_equalization,
    "quip": quip,
}


def hidden_states(model: PreTrainedModel) -> Tensor:
    """Return what the decoder puts out, in exact arithmetic as far as float32 goes."""
    model.apply(disable_quantization)
    tokens = torch.randint(2, 128, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval().model(tokens, use_cache=False).last_hidden_state


def norms(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Return a norm's weight in each decoder layer that still has it."""
    found = [getattr(layer, name, None) for layer in model.model.layers]
    weights = [getattr(norm, "weight", None) for norm in found]
    return [weight.detach().clone() for weight in weights if weight is not None]


def changed(model: PreTrainedModel, before: list[Tensor], name: str) -> list[bool]:
    after = norms(model, name)
    pairs = zip(before, after, strict=True)
    return [not torch.equal(old, new) for old, new in pairs]


@pytest.fixture(scope="module")
def linearized_only(tiny_models: TinyModels, rows: Dataset) -> Any:
    """Return the hidden states and norms of models that only NBL was applied to."""
    known: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def look_up(family: str, layers: list[int], kind: Kind) -> Any:
        key = (family, tuple(layers), kind)
        if key not in known:
            model = load(tiny_models(family))
            compress(model, NBLModifier(layers=layers, input=kind), rows)
            known[key] = hidden_states(model), norms(model, "input_layernorm")
        return known[key]

    return look_up


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", SETS, ids=lambda s: "".join(map(str, s)))
@pytest.mark.parametrize(("family", "recipe"), [*itertools.product(FAMILIES, RECIPES)])
def test_smoothing_is_an_identity(
    tiny_models: TinyModels,
    rows: Dataset,
    linearized_only: Any,
    family: str,
    recipe: str,
    layers: list[int],
    kind: Kind,
) -> None:
    expected, before = linearized_only(family, layers, kind)
    model = load(tiny_models(family))
    modifiers = [NBLModifier(layers=layers, input=kind), *RECIPES[recipe]()]
    compress(model, modifiers, rows)
    assert linearized(model) == layers
    error = torch.linalg.norm(hidden_states(model) - expected)
    # float32: 6e-8 per operation; 4 layers of a few hundred each.
    assert error <= 1e-5 * torch.linalg.norm(expected)
    moved = changed(model, before, "input_layernorm")
    if recipe in ("smoothquant", "log_equalization"):
        # Every input norm that is left, of kept and of linearized layers alike.
        assert moved == [True] * (4 if kind == "normalized" else 4 - len(layers))
    elif recipe == "awq" and kind == "normalized":
        assert any(moved)  # AWQ may find no scale to be best


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        (family, recipe)
        for family, recipe in itertools.product(
            sorted({*THOROUGH} - {*FAMILIES, "llava"}), ["awq", "smoothquant"]
        )
        # refused, below
        if not (recipe == "smoothquant" and ARCHITECTURES[family].post_norm)
    ],
)
def test_smoothing_is_an_identity_in_other_families(
    tiny_models: TinyModels,
    rows: Dataset,
    linearized_only: Any,
    family: str,
    recipe: str,
) -> None:
    """Also AWQ on Mixtral and OLMo 2, where llm-compressor's mappings do not fit."""
    layers, kind = [1, 2], ARCHITECTURES[family].inputs[-1]
    expected, _ = linearized_only(family, layers, kind)
    model = load(tiny_models(family))
    modifiers = [NBLModifier(layers=layers, input=kind), *RECIPES[recipe]()]
    compress(model, modifiers, rows)
    error = torch.linalg.norm(hidden_states(model) - expected)
    assert error <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_norm_behind_attention_is_not_smoothed(
    tiny_models: TinyModels, rows: Dataset, family: str
) -> None:
    """By llm-compressor's own mappings or by the user's, before calibration."""
    users: list[tuple[Any, ...] | list[Any]] = [(MLP, "re:.*post_attention_layernorm$")]
    for mappings in (None, users):
        model = load(tiny_models(family))
        recipe = [NBLModifier(num_layers=1), SmoothQuantModifier(mappings=mappings)]
        with pytest.raises(ValueError, match="is behind attention.*without it"):
            compress(model, recipe, rows)
        assert linearized(model) == []


# --- the user's own mappings ----------------------------------------------------------

ATTENTION = ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
MLP = ["re:.*gate_proj$", "re:.*up_proj$"]
USERS = {
    "smoothquant attention": (
        SmoothQuantModifier,
        [[ATTENTION, "re:.*input_layernorm$"]],
        {"input_layernorm"},
    ),
    "smoothquant mlp": (
        SmoothQuantModifier,
        [[MLP, "re:.*post_attention_layernorm$"]],
        {"post_attention_layernorm"},
    ),
    "awq attention": (
        AWQModifier,
        [AWQMapping("re:.*input_layernorm$", ATTENTION)],
        {"input_layernorm"},
    ),
    "awq mlp": (
        AWQModifier,
        [AWQMapping("re:.*post_attention_layernorm$", MLP)],
        {"post_attention_layernorm"},
    ),
}


@pytest.mark.parametrize("case", USERS)
def test_user_mappings_are_honoured_and_kept(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path, case: str
) -> None:
    kind, mappings, smoothed = USERS[case]
    scheme = "W4A16_ASYM" if kind is AWQModifier else "W8A8"
    fields = {"n_grid": 4} if kind is AWQModifier else {}
    user = kind(mappings=mappings, **fields)
    model = load(tiny_models("llama"))
    names = ("input_layernorm", "post_attention_layernorm")
    before = {name: norms(model, name) for name in names}
    compress(
        model,
        [
            NBLModifier(layers=[0, 2], input="normalized"),
            user,
            quantizer(QuantizationModifier, scheme),
        ],
        rows,
        output_dir=str(tmp_path / "out"),
    )
    for name in names:
        moved = changed(model, before[name], name)
        assert any(moved) == (name in smoothed), name
        if kind is SmoothQuantModifier:
            assert all(moved) == (name in smoothed), name
    assert user.mappings == mappings
    # What is saved replays: the same tensors from the saved recipe.
    recipe = tmp_path / "out" / "recipe.yaml"
    saved = yaml.safe_load(recipe.read_text())["default_stage"]["default_modifiers"]
    assert "linear" not in str(saved[kind.__name__])
    again = load(tiny_models("llama"))
    compress(again, str(recipe), rows)
    for name in names:
        for one, other in zip(norms(model, name), norms(again, name), strict=True):
            assert torch.equal(one, other)


def test_inferred_mappings_are_not_saved_as_the_users(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    for name in ("awq", "smoothquant"):
        folder = tmp_path / name
        recipe = [NBLModifier(layers=[1]), *RECIPES[name]()]
        compress(load(tiny_models("llama")), recipe, rows, output_dir=str(folder))
        saved = (folder / "recipe.yaml").read_text()
        assert "mappings" not in saved
        compress(load(tiny_models("llama")), saved, rows)


def test_mapping_by_name(tiny_models: TinyModels, rows: Dataset) -> None:
    """One layer's mapping, written out, for a kept and for a linearized layer."""
    prefix = "model.layers.{}."
    mappings: list[tuple[Any, ...] | list[Any]] = [
        (
            [f"{prefix.format(index)}self_attn.{letter}_proj" for letter in "qkv"],
            f"{prefix.format(index)}input_layernorm",
        )
        for index in (1, 2)
    ]
    model = load(tiny_models("llama"))
    before = norms(model, "input_layernorm")
    compress(
        model,
        [
            NBLModifier(layers=[0, 2], input="normalized"),
            SmoothQuantModifier(mappings=mappings),
            quantizer(QuantizationModifier, "W8A8"),
        ],
        rows,
    )
    assert changed(model, before, "input_layernorm") == [False, True, True, False]


@pytest.mark.parametrize(
    "modifier",
    [
        lambda: SmoothQuantModifier(mappings=[[ATTENTION, "LlamaRMSNorm"]]),
        lambda: SmoothQuantModifier(mappings=[[["Linear"], "re:.*input_layernorm$"]]),
        lambda: AWQModifier(mappings=[AWQMapping("LlamaRMSNorm", ATTENTION)]),
        lambda: AWQModifier(mappings=[AWQMapping("re:.*input_layernorm$", ["Linear"])]),
    ],
)
def test_class_names_are_refused(
    tiny_models: TinyModels, rows: Dataset, modifier: Any
) -> None:
    recipe = [
        NBLModifier(num_layers=1),
        modifier(),
        quantizer(QuantizationModifier, "W4A16_ASYM"),
    ]
    with pytest.raises(
        ValueError, match="is a class name.*Use a pattern of module names"
    ):
        compress(load(tiny_models("llama")), recipe, rows)


# --- rewriting ------------------------------------------------------------------------


def test_layer_numbers_are_matched_whole(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    """Layer 1 is not layer 11, and another list called layers is not the decoder."""
    model = load(tiny_models("llama"))
    compress(model, NBLModifier(layers=[1], input="normalized"), rows)
    mixed = MixedModel.of(model)
    mapping = [(["re:.*q_proj$"], "re:.*input_layernorm$")]
    kept, inside = (
        entry.smooth_layers for entry in rewrite_smoothquant(mapping, mixed)
    )

    def matches(pattern: str, name: str) -> bool:
        return re.match(pattern.removeprefix("re:"), name) is not None

    for name, where in (
        ("model.layers.1.input_layernorm", inside),
        ("model.layers.0.input_layernorm", kept),
        ("model.layers.11.input_layernorm", kept),
        ("vision.model.layers.1.input_layernorm", kept),
    ):
        assert matches(where, name), name
        assert not matches(inside if where is kept else kept, name), name
