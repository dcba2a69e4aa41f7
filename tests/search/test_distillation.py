# SPDX-License-Identifier: Apache-2.0
"""Training of the maps: what it trains, towards what, on what, and what it leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import linear

from nbl_modifier import NBLModifier
from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration.forward import PartialForward, calling
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.replacement.surgery import Replacement, replaced
from nbl_modifier.search.distillation import RATES, Distillation
from nbl_modifier.search.trials import Trials
from tests.followers import TinyModels
from tests.search.runs import padded_batches
from tests.tiny_llama import (
    DEMO_MODEL,
    Model,
    compress,
    demo_tokenizer,
    load,
    load_on_disk,
    token_rows,
)
from tests.work import count_flops

pytestmark = pytest.mark.usefixtures("one_thread")

# In the second half: a step runs the model from the first of them on.
LAYERS = [8, 9, 11, 15]
NUM_LAYERS = 16


def run(
    model: Model, rows: Dataset, **fields: Any
) -> tuple[dict[str, Tensor], NBLReport]:
    """Return the weights of a model after oneshot(), and the report."""
    modifier = NBLModifier(**fields)
    model = compress(model, modifier, rows)
    assert modifier.report is not None
    return model.state_dict(), modifier.report


def distilled(report: NBLReport) -> float:
    assert report.heldout is not None
    assert report.heldout.distilled is not None
    return report.heldout.distilled


@pytest.fixture(scope="module")
def source() -> Dataset:
    """Return Python source for the demo model."""
    texts = stdlib_texts("calibration")
    return pack(texts, demo_tokenizer(), seq_length=128, num_sequences=32)


def only(layers: list[int]) -> dict[str, Any]:
    """Return fields that replace these layers, and may measure what each one costs."""
    names = [f"model.layers.{index}.self_attn" for index in layers]
    return {"targets": names, "num_layers": len(layers)}


# --- what it does ---------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"input": "normalized"}, {}, {"rank": 32}], ids=str)
def test_a_trained_model_comes_nearer_to_the_original(
    source: Dataset, fields: dict[str, Any]
) -> None:
    """On windows that nothing was trained on, by maps and norms alone."""
    fields = {**only(LAYERS), "refit": True, **fields}
    # windows are held out here, too, and there is no trial that costs anything
    before, _ = run(load(DEMO_MODEL), source, max_nmse=1e6, **fields)
    fields |= {"distill": {"epochs": 2, "rate": 0.06}}
    after, report = run(load(DEMO_MODEL), source, **fields)
    assert report.distill_epochs == 2
    assert report.heldout is not None
    assert report.heldout.refitted is not None
    lost = math.log(report.heldout.refitted / report.heldout.base)
    assert math.log(distilled(report) / report.heldout.base) < 0.95 * lost
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    maps = {name for name in after if ".linear." in name}
    norms = {
        f"model.layers.{index}.{norm}_layernorm.weight"
        for index in range(min(LAYERS), NUM_LAYERS)
        for norm in ("input", "post_attention")
    }
    unread = {f"model.layers.{index}.input_layernorm.weight" for index in LAYERS}
    assert maps <= changed <= maps | norms
    if report.input == "normalized":
        unread = set()
    # rounding may leave one as it was
    assert len(changed - maps) > 0.8 * len(norms - unread)
    assert {after[name].dtype for name in maps} == {torch.bfloat16}


def test_it_can_be_repeated(source: Dataset) -> None:
    fields: dict[str, Any] = {"layers": [11, 13], "distill": {"epochs": 1}}
    few = source.select(range(16))
    once, _ = run(load(DEMO_MODEL), few, **fields)
    torch.rand(3)
    again, _ = run(load(DEMO_MODEL), few, **fields)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_what_does_not_help_is_not_kept(
    llama: Path, rows: Dataset, logged: list[str]
) -> None:
    fields: dict[str, Any] = {**only([1, 2]), "criterion": "loss"}
    fitted, _ = run(load(llama), rows, **fields)
    distill = {"epochs": 2, "rate": 1e6}
    after, report = run(load(llama), rows, **fields, distill=distill)
    assert all(torch.equal(fitted[name], after[name]) for name in fitted)
    assert report.heldout is not None
    assert distilled(report) == report.heldout.replaced
    (warning,) = (text for text in logged if "no nearer" in text)
    assert "lower distill: {rate} than 333333" in warning


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"kind": "block"}),
        ("llama", {"kind": "block", "rank": 8}),
        ("llama", {"method": "wo_wv", "input": "normalized"}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("granite", {"rank": 0.25}),
        ("cohere", {"input": "normalized"}),
        ("mixtral", {}),
        ("phi3", {"dampening_frac": 0.01}),
    ],
)
def test_every_kind_of_map_and_family(
    tiny_models: TinyModels, family: str, fields: dict[str, Any]
) -> None:
    """Of random models, which are nearly linear, it may or may not help."""
    rows = token_rows(num_rows=12, length=24)
    fields = {"num_layers": 2, "distill": {"epochs": 1}, **fields}
    model = load(tiny_models(family))
    model.get_input_embeddings().requires_grad_(False)
    before = {name: w.requires_grad for name, w in model.named_parameters()}
    assert set(before.values()) == {True, False}
    _, report = run(model, rows, **fields)
    assert distilled(report) > 0
    assert all(weight.grad is None for weight in model.parameters())
    after = {name: w.requires_grad for name, w in model.named_parameters()}
    kept = before.keys() & after.keys()
    assert len(kept) > len(before) / 2
    assert {name: after[name] for name in kept} == {n: before[n] for n in kept}


def test_offloaded_models(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    """And no gradient of their weights is asked for, which would be in memory."""
    asked: set[bool] = set()

    def look(module: Any, *_: object) -> None:
        if torch.is_grad_enabled():
            asked.add(module.weight.requires_grad)

    fields: dict[str, Any] = {"layers": [1, 3], "distill": {"epochs": 1}}
    model = load_on_disk(llama, tmp_path)
    model.model.layers[2].mlp.up_proj.register_forward_hook(look)
    _, there = run(model, rows, **fields)
    assert asked == {False}
    _, here = run(load(llama), rows, **fields)
    assert distilled(there) == pytest.approx(distilled(here), rel=1e-6)


# --- what it is made of ---------------------------------------------------------------


def dense(index: int, d: int) -> Replacement:
    generator = torch.Generator().manual_seed(index)
    weight = torch.randn(d, d, generator=generator) / d
    return Replacement(LinearizedLayer("normalized"), weight, torch.zeros(d))


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_gradient_is_that_of_the_whole_graph(
    tiny_models: TinyModels,
    family: str,
    kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that backward runs again, or does not, a skipped head and all."""
    monkeypatch.setattr("nbl_modifier.calibration.forward._KEPT_BYTES", kept_bytes)
    model = load(tiny_models(family)).eval()
    architecture = architecture_of(model.config.model_type)
    forward = PartialForward(model, architecture)
    d = model.config.hidden_size
    batch = padded_batches(1)[0]
    weight = dense(1, d).weight
    assert weight is not None
    gradients = []
    with replaced(forward.layers, architecture, {1: dense(1, d)}):
        attention = forward.layers[1].get_submodule(architecture.attention)
        module = attention.get_submodule("linear")
        for differentiable in (True, False):
            trained = weight.clone().requires_grad_(True)
            with calling(module, lambda x, w=trained: linear(x, w)):
                if differentiable:
                    with torch.no_grad():
                        logits = forward.differentiable_logits(batch, 1)
                else:
                    logits = model(**batch, use_cache=False).logits
                logits.square().mean().backward()
            assert trained.grad is not None
            gradients.append(trained.grad)
    torch.testing.assert_close(*gradients)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("rank", [None, 16])
def test_steps_are_as_large_as_said(tiny_models: TinyModels, rank: int | None) -> None:
    """One window, one step: it has the spectral norm that the rate asks for."""
    model = load(tiny_models("llama")).eval()
    architecture = architecture_of("llama")
    forward = PartialForward(model, architecture)
    first, second = padded_batches(2)
    d, rate = model.config.hidden_size, 0.01
    generator = torch.Generator().manual_seed(0)
    spec = LinearizedLayer("normalized", rank=rank)
    inner = torch.randn(rank or d, d, generator=generator) / d
    start = Replacement(spec, inner, torch.zeros(d))
    if rank is not None:
        expand, _ = torch.linalg.qr(torch.randn(d, rank, generator=generator))
        start = Replacement(spec, expand, torch.zeros(d), inner)
    one = {name: values[1:] for name, values in first.items()}
    seen: list[Tensor] = []
    with replaced(forward.layers, architecture, {2: start}):
        module = forward.layers[2].get_submodule("self_attn.linear")
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        forward.hidden_states(one, 3)
    trials = Trials(forward, architecture, Windows([second]))
    distillation = Distillation(forward, architecture, Windows([one]), trials)
    result = distillation.run({2: start}, epochs=1, rate=rate)
    trained = result[0][2]
    # the first token does not count
    spread = seen[0][0, 1:].double().std(0, correction=0)
    features = float((inner * spread).square().sum(1).mean().sqrt())
    assert start.weight is not None
    assert trained.weight is not None
    sizes = {"inner": rate * features / math.sqrt(d)}
    if rank is None:
        moved = {"inner": (trained.weight - start.weight) * spread}
    else:
        assert trained.reduce is not None
        moved = {
            "inner": (trained.reduce - inner) * spread,
            "expand": (trained.weight - start.weight).double(),
        }
        sizes["expand"] = rate / math.sqrt(d)
    for name, change in moved.items():
        norm = float(torch.linalg.matrix_norm(change, 2))
        # the iteration that orthogonalizes leaves singular values of 0.7 to 1.2
        assert 0.68 * sizes[name] < norm < 1.22 * sizes[name], name


def test_an_epoch_costs_three_forward_passes(tiny_models: TinyModels) -> None:
    """Beside the head's product, and a pass over the held-out windows."""
    model = load(tiny_models("llama")).eval()
    architecture = architecture_of("llama")
    forward = PartialForward(model, architecture)
    windows = Windows(padded_batches(8))
    with count_flops() as passes:
        for batch in windows.batches:
            forward.logits(batch)
    start = {index: dense(index, model.config.hidden_size) for index in (1, 2)}
    flops = []
    for rate in (0.02, 0.01):
        trials = Trials(forward, architecture, windows.select([0]))
        distillation = Distillation(forward, architecture, windows, trials)
        with count_flops() as counted:
            distillation.run(start, epochs=1, rate=rate)
        flops.append(counted.get_total_flops())
        with count_flops() as counted:  # the original model has run by now
            distillation.run(start, epochs=1, rate=rate)
        flops.append(counted.get_total_flops())
    assert flops[0] == flops[2]
    assert flops[1] == flops[3]
    pass_, d = passes.get_total_flops(), model.config.hidden_size
    assert flops[0] - flops[1] == pytest.approx(pass_, rel=0.2)
    # each step orthogonalizes a gradient per map, however short its window
    steps = sum(len(batch["input_ids"]) for batch in windows.batches)
    orthogonalizing = steps * len(start) * 5 * 3 * 2 * d**3
    # forward, again for backward, backward; the original's head; two maps' inputs;
    # and both trials of a window in eight
    assert flops[1] - orthogonalizing < (3 + 1 + 1 + 3 / 8) * pass_


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen3"])
def test_trained_gains_are_what_the_model_computes_with(
    tiny_models: TinyModels, family: str
) -> None:
    """Of families whose norms add one to their weights, too."""
    model = load(tiny_models(family)).eval()
    architecture = architecture_of(model.config.model_type)
    forward = PartialForward(model, architecture)
    windows = Windows(padded_batches(8))
    trials = Trials(forward, architecture, windows)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    distillation = Distillation(forward, architecture, windows, trials)
    start = {1: dense(1, model.config.hidden_size)}
    trained, trial = distillation.run(start, epochs=1, rate=0.1)
    changed = {
        name: (weight.float() - weights[name].float()).abs().max()
        for name, weight in model.state_dict().items()
        if not torch.equal(weight, weights[name])
    }
    assert changed
    assert all("norm" in name for name in changed)
    # relative to a gain of about one
    steps = sum(len(batch["input_ids"]) for batch in windows.batches)
    assert 0 < max(changed.values()) < 1.5 * 0.02 * 0.1 * steps
    # the original's predictions were computed before
    assert trials.together(trained).kl == pytest.approx(trial.kl, rel=1e-5)


def test_the_rate_finds_itself(source: Dataset, logged: list[str]) -> None:
    """It is of the size of those tried, does what it does when given, and helps."""
    fields: dict[str, Any] = {"layers": LAYERS, "distill": {"epochs": 1}}
    found = run(load(DEMO_MODEL), source, **fields)[1]
    (said,) = (line for line in logged if line.startswith("NBL: distill: {rate"))
    rate = float(said.split("{rate: ")[1].split("}")[0])
    windows = int(said.split(" for ")[1].split()[0])
    assert any(
        rate == pytest.approx(tried * math.sqrt(12 / windows), rel=0.05)
        for tried in RATES
    )
    again = fields | {"distill": {"epochs": 1, "rate": rate}}
    given = run(load(DEMO_MODEL), source, **again)[1]
    assert distilled(found) == distilled(given)
    assert found.heldout is not None
    assert distilled(found) < found.heldout.replaced


def test_failure_leaves_the_model_as_it_was(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_models("llama")).eval()
    architecture = architecture_of("llama")
    forward = PartialForward(model, architecture)
    modules = list(model.named_modules())
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    windows = Windows(padded_batches(4))
    trials = Trials(forward, architecture, windows)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Tensor, "backward", fail)
    distillation = Distillation(forward, architecture, windows, trials)
    with pytest.raises(RuntimeError, match="out of memory"):
        distillation.run({1: dense(1, model.config.hidden_size)}, epochs=1, rate=0.1)
    assert list(model.named_modules()) == modules
    assert all(weight.requires_grad for weight in model.parameters())
    assert not {"forward", "weight"} & {
        name for module in model.modules() for name in vars(module)
    }
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


# --- what it needs --------------------------------------------------------------------


@pytest.mark.parametrize("distill", [{"epochs": -1}, {"epochs": 1, "rate": 0.0}])
def test_senseless_numbers_are_refused(distill: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"num_layers": 2, "distill": distill}
    with pytest.raises(ValueError, match=list(distill)[-1]):
        NBLModifier(**fields)
