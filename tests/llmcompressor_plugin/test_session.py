# SPDX-License-Identifier: Apache-2.0
"""What a modifier finds out of the run it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr

from nbl_modifier.calibration.observer import BatchInFlight
from nbl_modifier.layer_statistics.windows import CalibrationData
from nbl_modifier.llmcompressor_plugin.session import (
    batch_in_flight,
    running_oneshot,
    windows_of,
)
from tests.tiny_llama import compress, load

pytestmark = pytest.mark.usefixtures("one_thread")


class Asking(Modifier):
    """Asks while it is initialized, and at each batch of its pass."""

    requires_calibration_data: bool = True
    _output: str | None = PrivateAttr(default=None)
    _batches: list[BatchInFlight] = PrivateAttr(default_factory=list)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        oneshot = running_oneshot()
        assert oneshot is not None
        self._output = oneshot.output_dir
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        def ask(*_: Any) -> None:
            self._batches.append(batch_in_flight(state))

        self.register_hook(state.model.model.layers[0].self_attn, ask, "forward")

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        return True


def masked(rows: Dataset) -> Dataset:
    """Return the rows, of which one token in three is not to count."""
    return rows.add_column("loss_mask", [[1, 1, 0] * 21 + [1]] * len(rows))


def test_a_modifier_finds_the_call_it_runs_in(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    assert running_oneshot() is None
    modifier = Asking()
    compress(load(llama), modifier, rows, output_dir=str(tmp_path / "out"))
    assert modifier._output == str(tmp_path / "out")


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("pipeline", ["independent", "basic"])
def test_batches_are_told_apart(
    llama: Path, rows: Dataset, pipeline: str, counts: bool
) -> None:
    """A mask that comes with the data is used where the call says so."""
    modifier, few = Asking(), masked(rows.select(range(3)))
    compress(load(llama), modifier, few, pipeline=pipeline, use_loss_mask=counts)
    seen = modifier._batches[:3]  # the sequential pipeline runs a layer again
    assert [batch.number for batch in seen] == [0, 1, 2]
    for batch, mask in zip(seen, few["loss_mask"], strict=True):
        assert (batch.loss_mask is not None) == counts
        if batch.loss_mask is not None:
            assert batch.loss_mask.flatten().tolist() == mask


def test_windows_are_masked_as_the_pass_was(llama: Path, rows: Dataset) -> None:
    batch = {"input_ids": torch.arange(8)[None]}
    data, state = CalibrationData([batch], 1, frozenset()), State(model=load(llama))
    assert windows_of(state, data).loss_masks is None
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1]])
    state.loss_masks = [mask]
    windows = windows_of(state, data)
    assert windows.batches == [batch]
    assert windows.targets(0).tolist() == [[False, *(mask[0, 1:] != 0).tolist()]]
