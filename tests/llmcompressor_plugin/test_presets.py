# SPDX-License-Identifier: Apache-2.0
"""What a preset fills in, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from nbl_modifier import NBLModifier
from tests.followers import TinyModels
from tests.search.runs import run
from tests.tiny_llama import (
    compress,
    linearized,
    load,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_preset_fills_in_what_is_not_given(llama: Path, rows: Dataset) -> None:
    modifier = NBLModifier(num_layers=2, preset="best")
    assert (modifier.selection, modifier.criterion) == ("greedy", "kl_angle")
    model, report = run(llama, rows, num_layers=2, preset="best")
    spelled_out = {
        name: getattr(modifier, name)
        for name in ("criterion", "selection", "distill", "input")
    }
    same, _ = run(llama, rows, num_layers=2, **spelled_out)
    assert linearized(model) == linearized(same) == report.selected_layers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_given_fields_win_over_the_preset(logged: list[str]) -> None:
    modifier = NBLModifier(num_layers=2, preset="best", criterion="nmse", refit=True)
    assert modifier.criterion == "nmse"
    assert modifier.refit
    (said,) = (text for text in logged if "preset 'best'" in text)
    assert said.startswith("NBLModifier.criterion: 'nmse' as given, not ")


def test_preset_takes_the_input_that_a_family_has(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    recipe = NBLModifier(num_layers=1, preset="best")
    compress(load(tiny_models("olmo2")), recipe, rows)
    assert recipe.input == "residual"
    with pytest.raises(ValueError, match="Use input: residual"):
        compress(
            load(tiny_models("olmo2")),
            NBLModifier(num_layers=1, preset="best", input="normalized"),
            rows,
        )
