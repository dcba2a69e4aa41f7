# SPDX-License-Identifier: Apache-2.0
"""Everything that may follow NBL in a recipe, on every kind of set of layers."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import (
    ConstantPruningModifier,
    MagnitudePruningModifier,
)
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.modeling_nbl import LinearizedAttention
from tests.followers import (
    FAMILIES,
    FOLLOWERS,
    LAYER_SETS,
    Follower,
    Kind,
    TinyModels,
    quantizer,
    quip,
)
from tests.tiny_llama import compress, linearized, load, logits_of, tensors_in
from tests.tiny_models import THOROUGH

pytestmark = pytest.mark.usefixtures(
    "one_thread", "pageable_cache", "old_garbage_frozen"
)


@dataclass(frozen=True)
class Case:
    """
    One cell of the matrix.

    :param family: model type
    :param recipe: key of ``FOLLOWERS``, what comes after NBL
    :param layers: the layers that NBL replaces
    :param kind: what the linear layers read
    """

    family: str
    recipe: str
    layers: tuple[int, ...]
    kind: Kind

    def __str__(self) -> str:
        layers = "".join(map(str, self.layers))
        return f"{self.family}-{self.recipe}-{layers}-{self.kind}"


CASES = [
    Case(family, recipe, tuple(layers), kind)
    for family, recipe, layers in itertools.product(FAMILIES, FOLLOWERS, LAYER_SETS)
    # What a linear layer reads matters to what smooths its input, and hardly to others.
    for kind in ("residual", "normalized")
    if layers == [1, 2]
    # Mistral differs from Llama in its mask, which no layer set changes.
    or (family != "mistral" and (kind == "residual" or FOLLOWERS[recipe].smooths))
]


@dataclass(frozen=True)
class Composed:
    """
    A finished run.

    :param case: what was run
    :param model: in memory
    :param folder: saved
    :param removed: the attention modules that were replaced
    """

    case: Case
    model: PreTrainedModel
    folder: Path
    removed: list[weakref.ref[nn.Module]]

    @property
    def follower(self) -> Follower:
        return FOLLOWERS[self.case.recipe]


@pytest.fixture(scope="module", params=CASES, ids=str)
def composed(
    request: pytest.FixtureRequest,
    tiny_models: TinyModels,
    rows: Dataset,
    one_thread: None,
    pageable_cache: None,
    old_garbage_frozen: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Composed:
    gc.freeze()  # also what the cases before left, AutoRound most of all
    case: Case = request.param
    follower = FOLLOWERS[case.recipe]
    model = load(tiny_models(case.family, follower.dtype))
    removed = [weakref.ref(model.model.layers[i].self_attn) for i in case.layers]
    nbl = NBLModifier(layers=list(case.layers), input=case.kind)
    recipe = [nbl, *follower.make()]
    folder = tmp_path_factory.mktemp("composed") / "out"
    compress(model, recipe, rows, batch_size=4, output_dir=str(folder))
    return Composed(case, model, folder, removed)


def load_with_info(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    return loaded


def is_2_to_4_sparse(weight: torch.Tensor) -> bool:
    return bool((weight.reshape(-1, 4).count_nonzero(dim=1) <= 2).all())


def test_every_linear_is_compressed(composed: Composed) -> None:
    assert linearized(composed.model) == list(composed.case.layers)
    for name, module in composed.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        done = (
            is_2_to_4_sparse(module.weight)
            if composed.follower.prunes
            else hasattr(module, "quantization_scheme")
        )
        assert done == (name != "lm_head"), name


def test_saved_tensors(composed: Composed) -> None:
    """A new linear layer is stored as its neighbours are, and nothing else is left."""
    names = tensors_in(composed.folder).keys()

    def stored(module: str) -> set[str]:
        prefix = f"model.layers.{composed.case.layers[0]}.{module}."
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    as_others = stored("mlp.up_proj")
    assert ("weight" in as_others and len(as_others) == 1) == composed.follower.prunes
    assert stored("self_attn.linear") == as_others | {"bias"}
    assert {name.partition(".")[0] for name in stored("self_attn")} == {"linear"}
    assert bool(stored("input_layernorm")) == (composed.case.kind == "normalized")


def test_reloads_as_it_is_in_memory(composed: Composed) -> None:
    nbl_modifier.hf.register()
    reloaded, info = load_with_info(composed.folder)
    assert not any(info.values()), info
    assert linearized(reloaded) == list(composed.case.layers)
    assert torch.equal(logits_of(reloaded), logits_of(composed.model))


def test_removed_attention_is_freed(composed: Composed) -> None:
    gc.collect()
    assert [ref() for ref in composed.removed] == [None] * len(composed.removed)


def test_nothing_of_the_run_stays_on_the_model(composed: Composed) -> None:
    for name, module in composed.model.named_modules():
        # the hook of a quantized KV cache is there to stay, on what has one
        if not hasattr(module, "kv_cache"):
            assert not module._forward_hooks, name
            assert not module._forward_pre_hooks, name
        if isinstance(module, LinearizedAttention):
            assert list(dict(module.named_children())) == ["linear"]


def test_kv_cache_scales_are_those_of_kept_layers(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    model = load(tiny_models("llama"))
    recipe: list[Any] = [
        NBLModifier(layers=[0, 2]),
        *FOLLOWERS["fp8_kv_cache"].make(),
    ]
    compress(model, recipe, rows, output_dir=str(tmp_path / "out"))
    scales = {name for name in tensors_in(tmp_path / "out") if "_scale" in name}
    assert {
        name for name in scales if name.split(".")[-1] in ("k_scale", "v_scale")
    } == {
        f"model.layers.{index}.self_attn.{letter}_scale"
        for index in (1, 3)
        for letter in "kv"
    }


def test_quip_loads_as_it_does_without_nbl(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    """
    transformers 5.17 does not build the rotations that QuIP saves, NBL or not.

    So its checkpoints reload with unexpected keys, and with other logits.
    """
    nbl_modifier.hf.register()
    unexpected = []
    for number, recipe in enumerate((quip(), [NBLModifier(layers=[1]), *quip()])):
        folder = tmp_path / str(number)
        compress(load(tiny_models("llama")), recipe, rows, output_dir=str(folder))
        _, info = load_with_info(folder)
        keys = info.pop("unexpected_keys")
        unexpected.append({name.split(".")[-2] for name in keys})
        assert not any(info.values())
    assert unexpected == [{"u_output", "v_input"}] * 2


OTHER_FAMILIES = sorted({*THOROUGH} - {*FAMILIES, "llava"})


EXPERTS = ["mixtral", "qwen3_moe"]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        (family, recipe)
        for family, recipe in itertools.product(OTHER_FAMILIES, ["w4a16", "w8a8"])
        if not (family in EXPERTS and recipe == "w8a8")  # below
    ],
)
def test_other_families(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path, family: str, recipe: str
) -> None:
    """Every linear layer is quantized, and loads as it was; LLaVA: test_families.py."""
    model = load(tiny_models(family))
    nbl = NBLModifier(layers=[1, 2], input=ARCHITECTURES[family].inputs[0])
    folder = tmp_path / "out"
    recipes = [nbl, *FOLLOWERS[recipe].make()]
    compress(model, recipes, rows, batch_size=4, output_dir=str(folder))
    assert linearized(model) == [1, 2]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert hasattr(module, "quantization_scheme") == (name != "lm_head"), name
    nbl_modifier.hf.register()
    reloaded, info = load_with_info(folder)
    assert not any(info.values()), info
    assert torch.equal(logits_of(reloaded), logits_of(model))


@pytest.mark.parametrize("before", [[], [1, 2]], ids=["base", "nbl"])
def test_int8_experts_are_not_loaded_by_transformers(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path, before: list[int]
) -> None:
    """NBL or not, transformers 5.17 cannot fuse 8-bit experts."""
    nbl = [NBLModifier(layers=before)] if before else []
    recipe = [*nbl, *FOLLOWERS["w8a8"].make()]
    folder = tmp_path / "out"
    compress(load(tiny_models("qwen3_moe")), recipe, rows, output_dir=str(folder))
    nbl_modifier.hf.register()
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load_with_info(folder)


def test_mixtral_reloads_with_nbl_only(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    """llm-compressor saves Mixtral's experts by names that nothing reads."""
    nbl_modifier.hf.register()
    for number, nbl in enumerate(([], [NBLModifier(layers=[1])])):
        folder = tmp_path / str(number)
        recipe = [*nbl, SmoothQuantModifier(smoothing_strength=0.5)]
        model = compress(
            load(tiny_models("mixtral")), recipe, rows, output_dir=str(folder)
        )
        reloaded, info = load_with_info(folder)
        lost = any("experts" in name for name in info["missing_keys"])
        assert lost == (not nbl)
        # Experts are apart in memory and one weight once reloaded: other sums.
        same = torch.allclose(logits_of(reloaded), logits_of(model), atol=1e-4)
        assert same == bool(nbl)


# --- what cannot be composed ----------------------------------------------------------


def w4a16() -> Modifier:
    return quantizer(QuantizationModifier, "W4A16")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            lambda: [NBLModifier(num_layers=1), SpinQuantModifier(), w4a16()],
            "SpinQuantModifier cannot follow NBLModifier: it centers the embeddings",
        ),
        (
            lambda: [
                NBLModifier(num_layers=1),
                MagnitudePruningModifier(
                    targets=["re:.*weight"], init_sparsity=0.0, final_sparsity=0.5
                ),
            ],
            "MagnitudePruningModifier cannot follow NBLModifier",
        ),
        (
            lambda: [
                NBLModifier(num_layers=1),
                ConstantPruningModifier(targets=["re:.*weight"]),
            ],
            "ConstantPruningModifier cannot follow NBLModifier",
        ),
    ],
)
def test_modifiers_that_cannot_follow_are_refused(
    llama: Path, rows: Dataset, recipe: Callable[[], list[Modifier]], message: str
) -> None:
    model = load(llama)
    before = logits_of(model)
    with pytest.raises(ValueError, match=message):
        compress(model, recipe(), rows)
    assert linearized(model) == []
    assert torch.equal(logits_of(model), before)


def test_smoothing_before_nbl(llama: Path, rows: Dataset) -> None:
    """What does not quantize may come first: NBL measures the model it leaves."""
    model = compress(
        load(llama),
        [
            SmoothQuantModifier(smoothing_strength=0.8),
            NBLModifier(layers=[0, 2]),
            quantizer(QuantizationModifier, "W8A8"),
        ],
        rows,
    )
    assert linearized(model) == [0, 2]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert hasattr(module, "quantization_scheme"), name
