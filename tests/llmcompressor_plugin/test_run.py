# SPDX-License-Identifier: Apache-2.0
"""What a run measures, counts and keeps on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.calibration.calibration import Calibration
from tests.llmcompressor_plugin.test_modifier import run
from tests.replacement.test_candidates import nothing_written, one_layer
from tests.tiny_llama import compress, load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_only_the_maps_that_may_be_chosen_are_kept(
    llama: Path, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All maps of an 80-layer model would take 20 GB."""
    counts = []
    original = Calibration.solve_finished

    def counted(self: Calibration, modules: Any) -> None:
        original(self, modules)
        counts.append(len(self.replacements))

    monkeypatch.setattr(Calibration, "solve_finished", counted)
    run(llama, NBLModifier(num_layers=2), rows)
    assert max(counts) == 2


@pytest.mark.parametrize("fields", [{"max_nmse": 5.0}, {"selection": "greedy"}])
def test_all_maps_are_kept_where_any_may_be_chosen(
    llama: Path, rows: Dataset, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    counts = []
    original = Calibration.finish

    def counted(self: Calibration) -> None:
        original(self)
        counts.append(len(self.replacements))

    monkeypatch.setattr(Calibration, "finish", counted)
    run(llama, NBLModifier(num_layers=2, **fields), rows)
    assert counts[0] == 4  # of the pipeline's pass


def test_layers_that_are_finished_in_parts_count_once(
    llama: Path, rows: Dataset
) -> None:
    modifier = NBLModifier(num_layers=1)
    between = ["re:.*post_attention_layernorm"]
    compress(load(llama), modifier, rows, sequential_targets=between)
    progress = modifier._run.progress
    assert progress.passes == progress.cost.passes == 1.0


def test_attention_that_is_never_called(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    """Sequential targets inside attention take it apart; no hook would fire."""
    with (
        nothing_written(tmp_path),
        pytest.raises(RuntimeError, match=r"layers\.0\.self_attn") as caught,
    ):
        compress(
            load(llama),
            one_layer(),
            rows,
            sequential_targets=["Linear"],
            output_dir=str(tmp_path / "out"),
        )
    assert "sequential_targets" in str(caught.value)
