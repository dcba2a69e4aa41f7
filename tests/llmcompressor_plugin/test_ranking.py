# SPDX-License-Identifier: Apache-2.0
"""Ranking alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers.quantization import GPTQModifier

from nbl_modifier import NBLModifier
from nbl_modifier.llmcompressor_plugin.ranking import RankingModifier
from tests.tiny_llama import (
    FOUR_BITS,
    compress,
    linearized,
    load,
    logits_of,
    token_rows,
)


@pytest.mark.parametrize("criterion", ["cca_bound", "loss"])
def test_ranking_is_that_of_the_modifier(llama: Path, criterion: Any) -> None:
    reference = NBLModifier(num_layers=1, criterion=criterion)
    compress(load(llama), [reference], token_rows())
    modifier = RankingModifier(criterion=criterion)
    compress(load(llama), [modifier], token_rows())
    assert reference.report is not None
    expected = [(layer.index, layer.score) for layer in reference.report.ranking]
    ranked = [(layer.index, layer.score) for layer in modifier.ranking.ranking]
    assert ranked == expected


def test_model_is_left_as_it_is(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    before = logits_of(model)
    compress(model, [RankingModifier()], token_rows(), output_dir=str(tmp_path))
    assert torch.equal(logits_of(model), before)
    assert linearized(model) == []
    assert type(load(tmp_path)) is type(load(llama))


def test_a_later_quantizer_finds_attention(llama: Path) -> None:
    recipe = [
        RankingModifier(),
        GPTQModifier(config_groups=FOUR_BITS, ignore=["lm_head"]),
    ]
    model = compress(load(llama), recipe, token_rows())
    assert model.model.layers[0].self_attn.q_proj.quantization_scheme is not None


def test_a_linearized_model_keeps_its_layers(llama: Path, tmp_path: Path) -> None:
    first = NBLModifier(layers=[2])
    compress(load(llama), [first], token_rows(), output_dir=str(tmp_path))
    modifier = RankingModifier()
    compress(load(tmp_path), [modifier], token_rows())
    assert modifier.ranking.selected_layers == [2]
    assert sorted(layer.index for layer in modifier.ranking.layers) == [0, 1, 3]


def test_there_is_no_ranking_before_calibration() -> None:
    with pytest.raises(RuntimeError, match="not been measured yet"):
        _ = RankingModifier().ranking


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 1), ("max_nmse", 0.5), ("preset", "best"), ("refit", True)],
)
def test_what_says_how_to_replace_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"replaces no layer, so {name} has no effect"):
        RankingModifier(**{name: value})


def test_nothing_is_replaced_on_the_way(llama: Path) -> None:
    """Of trials there are those of each layer alone, and no choice is measured."""
    modifier = RankingModifier(criterion="loss")
    compress(load(llama), [modifier], token_rows())
    report = modifier.ranking
    assert report.heldout is None
    assert report.binding is None
    assert {layer.selected for layer in report.layers} == {False}
    assert all(layer.reason.endswith("ranked only") for layer in report.layers)
    progress = modifier._run.progress
    assert progress.passes == pytest.approx(progress.cost.passes)
