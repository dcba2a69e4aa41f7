# SPDX-License-Identifier: Apache-2.0
"""Which layers a recipe means, how many, and by what they are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.llmcompressor_plugin.choices import choose_rank
from tests.llmcompressor_plugin.test_modifier import (
    run,
    warnings_of,
)
from tests.llmcompressor_plugin.test_options import run as run_fields
from tests.tiny_llama import (
    linearized,
)
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_named_layers_are_the_only_ones_measured(llama: Path, rows: Dataset) -> None:
    model, report = run(llama, NBLModifier(layers=[3, 1]), rows)
    assert linearized(model) == report.selected_layers == [1, 3]
    assert {layer.index for layer in report.layers} == {1, 3}


@pytest.mark.parametrize(
    ("fields", "measured"),
    [
        ({"targets": ["LlamaAttention"]}, [0, 1, 2, 3]),
        ({"targets": [r"re:.*layers\.[12]\.self_attn$"]}, [1, 2]),
        ({"targets": ["model.layers.2.self_attn"]}, [2]),
        ({"ignore": [r"re:.*layers\.[03]\..*"]}, [1, 2]),
        ({"ignore": ["model.layers.2.self_attn"]}, [0, 1, 3]),
        (
            {
                "targets": ["re:.*self_attn"],
                "ignore": [r"re:.*layers\.0", "model.layers.3.self_attn"],
            },
            [1, 2],
        ),
    ],
)
def test_targets_and_ignore(
    llama: Path, rows: Dataset, fields: dict[str, Any], measured: list[int]
) -> None:
    model, report = run(llama, NBLModifier(num_layers=1, **fields), rows)
    assert sorted(layer.index for layer in report.layers) == measured
    assert linearized(model) == [report.ranking[0].index]


@pytest.mark.parametrize(("reduction", "count"), [(0.01, 1), (0.5, 2), (0.51, 3)])
def test_kv_cache_reduction_is_a_number_of_layers(
    llama: Path, rows: Dataset, reduction: float, count: int
) -> None:
    model, report = run(llama, NBLModifier(kv_cache_reduction=reduction), rows)
    by_count, _ = run(llama, NBLModifier(num_layers=count), rows)
    assert linearized(model) == linearized(by_count)
    assert report.num_replaced == count
    assert f"kv_cache_reduction={reduction}" in report.layers[0].reason
    assert report.kv_cache_fraction == 1 - count / 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sliding layers and three with full attention, in turns."""
    folder = tmp_path_factory.mktemp("gemma") / "base"
    return save_tiny(folder, "gemma2", num_layers=6)


@pytest.mark.parametrize(
    ("selection", "criterion"),
    [("one_shot", "cca_bound"), ("greedy", "nmse"), ("greedy", "kl")],
)
def test_kv_cache_reduction_takes_layers_of_the_kind_that_frees_most(
    gemma: Path, rows: Dataset, selection: Any, criterion: Any
) -> None:
    """Of 3 x (16 + 17) blocks three full layers take 3 x 16, sliding ones 3 x 17."""
    nbl = NBLModifier(kv_cache_reduction=0.5, selection=selection, criterion=criterion)
    model, report = run(gemma, nbl, rows)
    assert [layer.index for layer in report.ranking][:3] != [0, 2, 4]
    assert linearized(model) == [0, 2, 4]
    assert report.kv_cache_context == 256
    assert report.kv_cache_fraction == pytest.approx(48 / 99)
    (other,) = {layer.reason for layer in report.layers if layer.index == 5}
    assert "no more with full attention" in other or selection == "greedy"


def test_layers_that_free_no_kv_cache_are_told(
    gemma: Path, rows: Dataset, logged: list[str]
) -> None:
    """2 x (16 + 2 x 17) blocks for sequences of 256 tokens, 3 x (16 + 17) before."""
    _, report = run(gemma, NBLModifier(layers=[1]), rows)
    assert report.kv_cache_fraction == pytest.approx(100 / 99)
    assert report.kv_cache_subject == "KV cache of a sequence of 256 tokens"
    (said,) = [text for text in logged if "frees no KV cache" in text]
    assert "layers [1]" in said
    assert "1.010 times" in said


def test_ignore_that_matches_nothing_is_said(llama: Path, rows: Dataset) -> None:
    with warnings_of() as messages:
        run(llama, NBLModifier(num_layers=1, ignore=["re:.*no_such"]), rows)
    assert any("ignore" in text and "no_such" in text for text in messages)


def test_all_blocks_cannot_go(llama: Path, rows: Dataset) -> None:
    with pytest.raises(ValueError, match="would leave none of the 4 layers"):
        run_fields(llama, rows, kind="block", method="drop", num_layers=4)


def test_rank_that_does_not_fit_the_model_is_refused(
    llama: Path, rows: Dataset
) -> None:
    with pytest.raises(ValueError, match="hidden size is 32, got 33"):
        run_fields(llama, rows, num_layers=2, rank=33)


def test_weights_map_of_a_family_without_one_is_refused(
    rows: Dataset, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "gemma", "gemma3_text")
    with pytest.raises(NotImplementedError, match="has a norm behind attention"):
        run_fields(base, rows, num_layers=1, method="wo_wv", input="normalized")


@pytest.mark.parametrize(
    ("rank", "expected"), [(None, None), (7, 7), (64, 64), (0.5, 32), (0.001, 1)]
)
def test_choose_rank(rank: float | None, expected: int | None) -> None:
    assert choose_rank(64, rank) == expected
