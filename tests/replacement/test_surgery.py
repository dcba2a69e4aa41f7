# SPDX-License-Identifier: Apache-2.0
"""Replacing attention in a live model, wherever its weights are kept."""

import gc
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from compressed_tensors.offload import (
    OffloadCache,
    disable_onloading,
    set_onload_device,
)
from torch import Tensor, nn

from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import LinearizedAttention
from nbl_modifier.replacement import surgery
from nbl_modifier.replacement.surgery import Replacement, replaced, weight_dtype
from tests.tiny_llama import Model, load, load_on_disk, logits_of, save_llama

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = ARCHITECTURES["llama"]
WIDTH = 32
INDEX = 2


def linear_map(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return weight.to(dtype), torch.randn(WIDTH, generator=generator).to(dtype)


def replace(
    model: Model,
    kind: Literal["residual", "normalized"] = "residual",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Replace attention in layer ``INDEX``; return the decoder layer."""
    layer = model.model.layers[INDEX]
    replacement = Replacement(LinearizedLayer(kind), *linear_map(dtype))
    surgery.replace(model.model.layers, LLAMA, {INDEX: replacement})
    return layer


def run(layer: Any) -> Tensor:
    """Return the decoder layer's output on fixed input."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(1, 5, WIDTH, generator=generator)
    with torch.no_grad():
        output: Tensor = layer(hidden_states, attention_mask=None)
    return output


def expected(layer: Any, kind: str) -> Tensor:
    """Return what ``run`` should, from the map and the modules that are kept."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(1, 5, WIDTH, generator=generator)
    weight, bias = linear_map()
    with torch.no_grad():
        normalized = kind == "normalized"
        seen = layer.input_layernorm(hidden_states) if normalized else hidden_states
        residual = hidden_states + nn.functional.linear(seen, weight, bias)
        return residual + layer.mlp(layer.post_attention_layernorm(residual))


@pytest.mark.parametrize("kind", ["residual", "normalized"])
def test_layer_computes_the_map(
    llama: Path, kind: Literal["residual", "normalized"]
) -> None:
    layer = replace(load(llama), kind)
    assert isinstance(layer.self_attn, LinearizedAttention)
    assert layer.self_attn.layer_idx == INDEX
    # residual: the norm is folded into the map, so it must not run any more
    assert isinstance(layer.input_layernorm, nn.Identity) == (kind == "residual")
    assert torch.equal(run(layer), expected(layer, kind))


def test_other_layers_stay(llama: Path) -> None:
    model = load(llama)
    before = dict(model.named_modules())
    replace(model)
    after = dict(model.named_modules())
    changed = f"model.layers.{INDEX}"
    for name, module in after.items():
        if not name.startswith(f"{changed}.self_attn") and name != (
            f"{changed}.input_layernorm"
        ):
            assert module is before[name]
    gone = before.keys() - after.keys()
    assert gone == {f"{changed}.self_attn.{x}_proj" for x in "qkvo"}
    assert after.keys() - before.keys() == {f"{changed}.self_attn.linear"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(save_llama(tmp_path / "model", num_layers=INDEX + 1, dtype=dtype))
    assert weight_dtype(model.model.layers[INDEX].self_attn) == dtype
    layer = replace(model, dtype=dtype)
    for name, tensor in zip(("weight", "bias"), linear_map(dtype), strict=True):
        parameter = getattr(layer.self_attn.linear, name)
        assert parameter.dtype == dtype
        assert torch.equal(parameter, tensor)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(llama: Path, training: bool) -> None:
    model = load(llama).train(training)
    replace(model)
    assert {module.training for module in model.modules()} == {training}


def settings(module: nn.Module) -> dict[str, object]:
    """Return how and where a module's weights are kept."""
    cache = module._parameters
    assert isinstance(cache, OffloadCache)
    return {
        "class": type(cache),
        "onload_device": cache.onload_device,
        "offload_device": cache.offload_device,
        "offload_dir": getattr(cache, "offload_dir", None),
    }


@pytest.mark.parametrize("kind", ["residual", "normalized"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_settings_are_kept(
    llama: Path, tmp_path: Path, place: str, kind: Literal["residual", "normalized"]
) -> None:
    if place == "disk":
        model = load_on_disk(llama, tmp_path)
    else:
        model = load(llama)
        set_onload_device(model, torch.device("cpu"))
    wanted = settings(model.model.layers[INDEX].self_attn.q_proj)
    assert wanted["offload_device"] == (
        "disk" if place == "disk" else torch.device("cpu")
    )
    layer = replace(model, kind)
    assert settings(layer.self_attn.linear) == wanted
    assert settings(layer.self_attn)["class"] == wanted["class"]
    if place == "disk":
        assert Path(str(wanted["offload_dir"])) == tmp_path
        with disable_onloading():  # what is held between forward passes
            assert layer.self_attn.linear.weight.device.type == "meta"
    assert torch.equal(run(layer), expected(layer, kind))
    # What llm-compressor does before each modifier's epoch; it would raise for a
    # module that is offloaded in part, and pin one that is not offloaded.
    set_onload_device(model, torch.device("cpu"))
    assert settings(layer.self_attn.linear) == wanted
    assert torch.equal(run(layer), expected(layer, kind))


def test_plain_models_are_not_offloaded(llama: Path) -> None:
    layer = replace(load(llama))
    for module in layer.self_attn.modules():
        assert not isinstance(module._parameters, OffloadCache)


@pytest.mark.parametrize("offloaded", [False, True])
def test_old_modules_and_weights_are_freed(llama: Path, offloaded: bool) -> None:
    model = load(llama)
    if offloaded:
        set_onload_device(model, torch.device("cpu"))
    layer = model.model.layers[INDEX]
    old = [layer.self_attn, *layer.self_attn.children(), layer.input_layernorm]
    watched = [weakref.ref(module) for module in old]
    with disable_onloading():
        watched += [weakref.ref(module.weight) for module in old[1:]]
    del layer, old
    replace(model)
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def low_rank_map() -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor applied last, the bias, and the factor applied first."""
    weight, bias = linear_map()
    return weight[:, :8].contiguous(), bias, weight[8:16].contiguous()


REPLACEMENTS = {
    "residual": Replacement(LinearizedLayer("residual"), *linear_map()),
    "normalized": Replacement(LinearizedLayer("normalized"), *linear_map()),
    "low-rank": Replacement(LinearizedLayer("residual", rank=8), *low_rank_map()),
    "drop": Replacement(LinearizedLayer(method="drop")),
    "block": Replacement(LinearizedLayer(kind="block"), *linear_map()),
    "low-rank-block": Replacement(
        LinearizedLayer(kind="block", rank=8), *low_rank_map()
    ),
    "dropped-block": Replacement(LinearizedLayer(kind="block", method="drop")),
}


@pytest.fixture(params=REPLACEMENTS)
def trial(request: pytest.FixtureRequest) -> Replacement:
    return REPLACEMENTS[request.param]


@pytest.mark.parametrize("place", ["plain", "cpu", "disk"])
def test_every_replacement_runs_wherever_weights_are(
    llama: Path, tmp_path: Path, place: str, trial: Replacement
) -> None:
    model = load_on_disk(llama, tmp_path) if place == "disk" else load(llama)
    if place == "cpu":
        set_onload_device(model, torch.device("cpu"))
    layer = model.model.layers[INDEX]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 5, WIDTH, generator=generator)
    seen = hidden
    if trial.spec.input == "normalized":
        seen = layer.input_layernorm(hidden)
    if trial.reduce is not None:
        seen = seen @ trial.reduce.T
    output = hidden
    if trial.weight is not None:
        output = hidden + nn.functional.linear(seen, trial.weight, trial.bias)
    if trial.spec.kind == "attention":
        output = output + layer.mlp(layer.post_attention_layernorm(output))
    surgery.replace(model.model.layers, LLAMA, {INDEX: trial})
    replaced_layer = model.model.layers[INDEX]
    # float32 sums of 32 products in another order
    torch.testing.assert_close(run(replaced_layer), output, rtol=0, atol=2e-5)
    assert {module.training for module in model.modules()} == {layer.training}
    if place != "plain":
        set_onload_device(model, torch.device("cpu"))
        block = trial.spec.kind == "block"
        new = replaced_layer if block else replaced_layer.self_attn
        wanted = settings(model.model.layers[0].mlp.up_proj)
        assert all(settings(module) == wanted for module in new.modules())
    surgery.drop_restored_norms(replaced_layer, LLAMA, trial.spec)
    torch.testing.assert_close(run(replaced_layer), output, rtol=0, atol=2e-5)
    left = {name.partition(".")[0] for name, _ in replaced_layer.named_modules()} - {""}
    if trial.spec.kind == "block":
        assert left == ({"linear"} if trial.weight is not None else set())


@pytest.mark.parametrize("place", ["plain", "disk"])
def test_trial_leaves_the_model_as_it_was(
    llama: Path, tmp_path: Path, place: str, trial: Replacement
) -> None:
    model = load_on_disk(llama, tmp_path) if place == "disk" else load(llama)
    modules = list(model.named_modules())
    files = sorted(tmp_path.iterdir())
    logits = logits_of(model)
    layers = model.model.layers
    with replaced(layers, LLAMA, {INDEX: trial}) as undone:
        alone = logits_of(model)
        with undone():
            assert list(model.named_modules()) == modules
            assert torch.equal(logits_of(model), logits)
        assert torch.equal(logits_of(model), alone)
        with replaced(layers, LLAMA, {0: trial}):
            assert not torch.equal(logits_of(model), alone)
        assert torch.equal(logits_of(model), alone)
    assert not torch.equal(logits, alone)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        replaced(layers, LLAMA, {1: trial}),
    ):
        raise RuntimeError("out of memory")
    # the same modules under the same names, in the same order
    assert list(model.named_modules()) == modules
    assert torch.equal(logits_of(model), logits)
    gc.collect()
    assert sorted(tmp_path.iterdir()) == files
