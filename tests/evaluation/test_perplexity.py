# SPDX-License-Identifier: Apache-2.0
"""Perplexity against the definition, and against transformers' own loss."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbl_modifier.evaluation import PerplexityResult, perplexity

VOCABULARY = 11


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Return a random two-layer Llama in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # far from uniform, so that mistakes show
    )
    return LlamaForCausalLM(config).eval()


def windows(*lengths: int) -> list[list[int]]:
    """Return random token windows of the given lengths."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        for length in lengths
    ]


def test_equals_the_loss_transformers_computes(model: LlamaForCausalLM) -> None:
    rows = windows(7, 7, 7)
    ids = torch.tensor(rows)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    result = perplexity(model, rows, batch_size=2)
    # the reference is a float32 mean of 18 terms
    assert result.nll_mean == pytest.approx(loss, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert result.num_tokens == 18


def test_uniform_model_has_the_size_of_its_vocabulary(model: LlamaForCausalLM) -> None:
    uniform = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    result = perplexity(uniform, windows(9, 9))
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    # every token costs log(vocabulary), in float32
    assert result.nll_standard_error == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_of_different_length_do_not_disturb_each_other(
    model: LlamaForCausalLM, batch_size: int
) -> None:
    rows = windows(3, 12, 5, 2, 8)
    alone = [perplexity(model, [row]).window_nlls[0] for row in rows]
    result = perplexity(model, rows, batch_size)
    # padding changes the order of float32 sums inside the model, nothing else
    assert result.window_nlls == pytest.approx(alone, rel=1e-5)
    assert result.window_tokens == (2, 11, 4, 1, 7)
    assert result.nll_mean == pytest.approx(sum(alone) / 25, rel=1e-5)


@pytest.mark.parametrize("kind", ["lists", "tensor", "rows", "dataset"])
def test_accepts_every_form_of_windows(model: LlamaForCausalLM, kind: str) -> None:
    from datasets import Dataset

    rows = windows(6, 6)
    forms: dict[str, Any] = {
        "lists": rows,
        "tensor": torch.tensor(rows),
        "rows": [{"input_ids": row} for row in rows],
        "dataset": Dataset.from_dict({"input_ids": rows}),
    }
    assert perplexity(model, forms[kind]) == perplexity(model, rows)


def test_standard_error_is_that_of_a_mean_over_equal_windows(
    model: LlamaForCausalLM,
) -> None:
    result = perplexity(model, windows(6, 6, 6, 6))
    means = torch.tensor(result.window_nlls, dtype=torch.float64) / 5
    expected = (means.std(correction=1) / 2).item()
    assert result.nll_standard_error == pytest.approx(expected, rel=1e-12)


def test_single_window_has_no_standard_error(model: LlamaForCausalLM) -> None:
    assert math.isnan(perplexity(model, windows(6)).nll_standard_error)


def test_train_mode_of_every_module_is_restored(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    perplexity(model, windows(4, 4))
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_mode_is_restored_after_an_error(model: LlamaForCausalLM) -> None:
    model.train()
    with pytest.raises(IndexError):
        perplexity(model, [[VOCABULARY + 1, 0]])
    assert model.training
    model.eval()


def test_no_gradient_is_kept(model: LlamaForCausalLM) -> None:
    model.requires_grad_(True)
    perplexity(model, windows(4, 4))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_offloaded_modules_are_used_as_they_are(model: LlamaForCausalLM) -> None:
    import copy

    from compressed_tensors.offload import set_onload_device

    rows = windows(6, 6)
    expected = perplexity(model, rows)
    offloaded = copy.deepcopy(model)
    set_onload_device(offloaded, torch.device("cpu"))
    assert perplexity(offloaded, rows) == expected


def test_ratio_is_paired(model: LlamaForCausalLM) -> None:
    def result(*nlls: float) -> PerplexityResult:
        mean = sum(nlls) / 20
        return PerplexityResult(math.exp(mean), mean, 9.9, 20, nlls, (10, 10))

    # windows of very different difficulty, each harder by exactly 0.1 nats per token
    ratio, error = result(11.0, 51.0).relative_to(result(10.0, 50.0))
    assert ratio == pytest.approx(math.exp(0.1), rel=1e-12)
    assert error == pytest.approx(0.0, abs=1e-12)
    # differences of 0 and 0.2 nats per token: their mean's standard error is 0.1
    ratio, error = result(10.0, 52.0).relative_to(result(10.0, 50.0))
    assert error == pytest.approx(math.exp(0.1) * 0.1, rel=1e-12)


def test_ratio_of_different_windows_is_refused(model: LlamaForCausalLM) -> None:
    one, two = perplexity(model, windows(6)), perplexity(model, windows(6, 6))
    with pytest.raises(ValueError, match="different windows, 1 and 2 of them"):
        one.relative_to(two)


@pytest.mark.parametrize("rows", [[], [[3]], [[], []]])
def test_nothing_to_predict_is_an_error(
    model: LlamaForCausalLM, rows: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="nothing to predict in"):
        perplexity(model, rows)


def test_overflow_is_infinite_rather_than_an_exception(
    model: LlamaForCausalLM,
) -> None:
    extreme = LlamaForCausalLM(model.config)
    torch.nn.init.constant_(extreme.lm_head.weight, 0.0)
    extreme.lm_head.weight.data[3] = 1e5
    extreme.model.norm.weight.data.fill_(1e3)
    rows = windows(30, 30)
    assert perplexity(extreme, rows).perplexity == math.inf
