# SPDX-License-Identifier: Apache-2.0
"""What llm-compressor gets wrong, on real runs: each fails without our remedy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from loguru import logger
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

import nbl_modifier.llmcompressor_plugin.switches
from nbl_modifier import NBLModifier
from nbl_modifier.calibration.observer import LayerObserver
from tests.followers import FAMILIES, FOLLOWERS, TinyModels
from tests.tiny_llama import compress, linearized, load, logits_of, tensors_in

pytestmark = pytest.mark.usefixtures("one_thread", "pageable_cache")


# --- the causal mask ------------------------------------------------------------------


def keep_output(seen: list[Tensor], _: nn.Module, __: Any, output: Any) -> None:
    """Forward hook: note the attention output of a batch of one."""
    seen.append(output[0][0])


def plain_outputs(model: PreTrainedModel, rows: Dataset) -> list[Tensor]:
    """Return each layer's attention output in a plain forward pass, all rows."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.self_attn.register_forward_hook(partial(keep_output, seen))
        for layer, seen in zip(model.model.layers, found, strict=True)
    ]
    for tokens in rows["input_ids"]:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(outputs) for outputs in found]


class Watch(Modifier):
    """A later modifier that records the attention outputs of its own pass."""

    requires_calibration_data: bool = True
    _seen: dict[int, list[Tensor]] = PrivateAttr(default_factory=dict)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        for index, layer in enumerate(state.model.model.layers):
            hook: Any = partial(keep_output, self._seen.setdefault(index, []))
            self.register_hook(layer.self_attn, hook, "forward")

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        return True


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_causal_in_calibration(
    tiny_models: TinyModels,
    rows: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    seen: dict[int, list[Tensor]] = {}
    original = LayerObserver._see_attention

    def record(self: Any, state: Any, index: int, *args: Any) -> None:
        seen.setdefault(index, []).append(args[-1][0][0])
        original(self, state, index, *args)

    monkeypatch.setattr(LayerObserver, "_see_attention", record)
    expected = plain_outputs(load(tiny_models(family)), rows)
    watch = Watch()
    # Layer 3 is last: what the later modifier sees before it is the base model's.
    model = compress(load(tiny_models(family)), [NBLModifier(layers=[3]), watch], rows)
    compress(load(tiny_models(family)), NBLModifier(num_layers=1), rows)
    later = watch._seen
    for index, outputs in enumerate(expected):
        # eager against SDPA kernels in float32: 1e-6; without a mask it is above 1
        size = torch.linalg.norm(outputs)
        calibrated = torch.cat(seen[index][-len(rows) :])
        assert torch.linalg.norm(calibrated - outputs) <= 1e-5 * size
        if index < 3:
            assert torch.linalg.norm(torch.cat(later[index]) - outputs) <= 1e-5 * size
    assert linearized(model) == [3]


def test_guard_without_the_fix(
    tiny_models: TinyModels, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nbl_modifier.llmcompressor_plugin.switches, "keep_causal_mask", lambda: None
    )
    with pytest.raises(RuntimeError, match=r"layers\.0.*ran without a causal mask"):
        compress(load(tiny_models("mistral")), NBLModifier(num_layers=1), rows)


class Failing(Modifier):
    """A later modifier that fails, in its own pass."""

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        return True


def test_tracer_is_upstreams_again_after_a_run(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    upstreams = SequentialTracer.create_arg
    compress(load(tiny_models("mistral")), NBLModifier(num_layers=1), rows)
    assert SequentialTracer.create_arg is upstreams
    with pytest.raises(RuntimeError, match="out of memory"):
        compress(
            load(tiny_models("mistral")), [NBLModifier(num_layers=1), Failing()], rows
        )
    # A failed run's modifiers are finalized when the next begins, NBL in it or not.
    compress(load(tiny_models("llama")), FOLLOWERS["w4a16"].make(), rows)
    assert SequentialTracer.create_arg is upstreams


# --- attention at the speed of the model ----------------------------------------------


def implementations(model: PreTrainedModel) -> list[str]:
    """Return what the model's masks and each layer's attention are made for."""
    configs = [layer.self_attn.config for layer in model.model.layers]
    return [config._attn_implementation for config in (model.config, *configs)]


@pytest.mark.parametrize(
    ("family", "loaded_with", "expected"),
    [
        ("llama", "sdpa", ["eager", *["sdpa"] * 4]),
        ("llama", "eager", ["eager"] * 5),
        ("gemma2", "sdpa", ["eager"] * 5),  # it limits the scores, sdpa does not
    ],
)
def test_attention_is_fused_in_calibration(
    tiny_models: TinyModels,
    rows: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    loaded_with: str,
    expected: list[str],
) -> None:
    seen: list[list[str]] = []
    original = LayerObserver._see_attention

    def record(*args: Any) -> None:
        seen.append(implementations(model))
        original(*args)

    monkeypatch.setattr(LayerObserver, "_see_attention", record)
    model = load(tiny_models(family), attn_implementation=loaded_with)
    kept = [layer.self_attn for layer in model.model.layers]
    compress(model, [NBLModifier(layers=[3])], rows)
    assert seen
    assert all(each == expected for each in seen)
    assert {id(attention.config) for attention in kept} == {id(kept[0].config)}
    assert kept[0].config._attn_implementation == loaded_with


def test_attention_is_the_models_own_after_a_failed_run(
    tiny_models: TinyModels, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model = load(tiny_models("llama"))
    kept = [layer.self_attn for layer in model.model.layers]
    with monkeypatch.context() as patched:
        patched.setattr(LayerObserver, "_see_attention", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            compress(model, NBLModifier(num_layers=1), rows)
    # A failed run's modifiers are finalized when the next begins.
    config = model.config
    compress(model, NBLModifier(num_layers=1), rows)
    assert all(attention.config is config for attention in kept)


# --- the finalize of a failed earlier run ---------------------------------------------


def test_failed_run_is_finalized_without_complaint(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    """llm-compressor finalizes its modifiers later, and logs what that raises."""
    model = load(tiny_models("llama"))
    model.model.layers[2].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
        compress(model, NBLModifier(num_layers=1), rows)
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    try:
        compress(load(tiny_models("llama")), NBLModifier(num_layers=1), rows)
    finally:
        logger.remove(sink)
    assert not [text for text in messages if "finalizing" in text]
    assert model.config.model_type == "llama"
    assert type(model).__name__ == "LlamaForCausalLM"


# --- norms restored by name -----------------------------------------------------------


def test_norms_of_removed_modules_stay_removed(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    model: Any = load(tiny_models("llama"))
    for layer in model.model.layers:
        # Norms of Gemma's kind, which llm-compressor exchanges for the time of a run.
        layer.input_layernorm = Gemma2RMSNorm(model.config.hidden_size)
        layer.self_attn.q_norm = Gemma2RMSNorm(model.config.head_dim)
    compress(model, NBLModifier(layers=[1]), rows)
    replaced, kept = model.model.layers[1], model.model.layers[0]
    assert isinstance(replaced.input_layernorm, nn.Identity)
    assert dict(replaced.self_attn.named_children()).keys() == {"linear"}
    assert isinstance(kept.input_layernorm, Gemma2RMSNorm)
    assert isinstance(kept.self_attn.q_norm, Gemma2RMSNorm)


# --- the calibration set --------------------------------------------------------------


def maps(tiny_models: TinyModels, rows: Dataset, **kwargs: Any) -> list[Tensor]:
    """Return the maps of a run that draws 10 of 16 samples."""
    model = compress(
        load(tiny_models("llama")),
        NBLModifier(layers=[0, 2]),
        rows,
        shuffle_calibration_samples=True,
        num_calibration_samples=10,
        **kwargs,
    )
    return [model.model.layers[index].self_attn.linear.weight for index in (0, 2)]


@pytest.mark.parametrize("pipeline", ["independent", "basic"])
def test_result_depends_on_the_seed_alone(
    tiny_models: TinyModels, rows: Dataset, pipeline: str
) -> None:
    runs: list[list[Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.rand(len(runs))  # what else the process drew does not matter
        runs.append(maps(tiny_models, rows, pipeline=pipeline))
    for first, second, other in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)  # another subset


def test_generator_goes_on_where_it_was(tiny_models: TinyModels, rows: Dataset) -> None:
    """Later passes draw their samples as if NBL's pass had drawn none."""
    torch.manual_seed(3)
    torch.rand(5)
    maps(tiny_models, rows)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(5)
    # Tracing, which comes before calibration, takes the first of a shuffled batch.
    next(iter(DataLoader(rows, sampler=RandomSampler(rows, num_samples=10))))
    assert torch.equal(drawn, torch.rand(4))


# --- the second pass per layer --------------------------------------------------------


@pytest.mark.parametrize("recipe", ["gptq", "smoothquant_gptq", "awq", "sparsegpt"])
def test_later_modifiers_do_not_notice_the_skipped_pass(
    tiny_models: TinyModels,
    rows: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    """Bit for bit what they give when NBL's own pass runs every layer twice."""

    def weights() -> tuple[dict[str, Tensor], int]:
        model: Any = load(tiny_models("llama"))
        calls: list[int] = []
        handle = model.model.layers[-1].mlp.register_forward_hook(
            lambda *_: calls.append(1)
        )
        compress(model, [NBLModifier(layers=[0, 2]), *FOLLOWERS[recipe].make()], rows)
        handle.remove()
        return model.state_dict(), len(calls)

    once, calls_once = weights()
    monkeypatch.setattr(
        nbl_modifier.llmcompressor_plugin.switches, "running_oneshot", lambda: None
    )
    twice, calls_twice = weights()
    assert calls_twice == calls_once + len(rows)
    assert once.keys() == twice.keys()
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name


# --- attention that is quantized ------------------------------------------------------


def fp8_attention() -> Modifier:
    """Return a quantizer of queries, keys and values, with scales from calibration."""
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"targets": ["LlamaAttention"], "input_activations": inputs}
    return QuantizationModifier(config_groups={"attention": group})


@pytest.mark.parametrize("way", ["one recipe", "checkpoint", "no NBL"])
def test_attention_is_quantized(
    llama: Path, rows: Dataset, tmp_path: Path, way: str
) -> None:
    source, layers, recipe = llama, [2], [fp8_attention()]
    before = tmp_path / "nbl"
    compress(load(llama), NBLModifier(layers=layers), rows, output_dir=str(before))
    if way == "one recipe":
        recipe.insert(0, NBLModifier(layers=layers))
    elif way == "checkpoint":
        source = before
    else:
        before, layers = llama, []
    unquantized = logits_of(load(before))
    model = compress(load(source), recipe, rows, output_dir=str(tmp_path / "out"))
    assert linearized(model) == layers
    logits = logits_of(model)  # before anything is loaded that sets things up again
    # 3 mantissa bits of queries, keys and values change a little, and something
    change = (logits - unquantized).std() / unquantized.std()
    assert 1e-3 < change < 0.2
    assert torch.equal(logits_of(load(tmp_path / "out")), logits)
    names = {"q_scale", "k_scale", "v_scale"}
    scales = {
        name: tensor
        for name, tensor in tensors_in(tmp_path / "out").items()
        if name.rpartition(".")[2] in names
    }
    assert len(scales) == 3 * (4 - len(layers))
    # of 448 steps; random weights of unit scale make queries of about 1 to 5
    assert all(1 < 448 * scale.item() < 20 for scale in scales.values())


def test_attention_without_a_name_is_not_quantized(llama: Path, rows: Dataset) -> None:
    model = load(llama, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'.*LlamaAttention"):
        compress(model, [NBLModifier(layers=[2]), fp8_attention()], rows)
