# SPDX-License-Identifier: Apache-2.0
"""One line for a whole run, in real llm-compressor runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from llmcompressor.pipelines.sequential import pipeline
from tqdm import tqdm

from nbl_modifier import NBLModifier
from tests.tiny_llama import compress, load, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")

ALL: dict[str, Any] = {"preset": "best", "distill": {"epochs": 1}}


class Terminal(io.StringIO):
    """Takes what a terminal would show."""

    def isatty(self) -> bool:
        return True


def test_one_line_stands_at_a_terminal(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of llm-compressor's, which has one for each layer."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    compress(load(llama), [NBLModifier(num_layers=1, **ALL)], token_rows())
    shown = terminal.getvalue().split("\r")
    assert not any("Calibrating" in line for line in shown)
    lines = [line for line in shown if line.startswith("NBL: ") and "|" in line]
    assert "left |" in lines[-1]
    assert pipeline.tqdm is tqdm  # theirs are back


def test_each_phase_is_logged_once_with_the_time_that_is_left(
    llama: Path, logged: list[str]
) -> None:
    modifier = NBLModifier(num_layers=2, **ALL)
    compress(load(llama), [modifier], token_rows())
    total = f"{modifier._run.progress.cost.passes:.1f} passes, about "
    lines = [line for line in logged if total in line]
    phases = ["measuring", "selection", "distillation"]
    assert [line.split()[1] for line in lines] == [f"{name}," for name in phases]
    # after the first of four layers
    assert lines[0].startswith("NBL: measuring, 0.2 of ")
    assert any("forward passes in" in line for line in logged)


def test_long_phases_are_logged_again(
    llama: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_modifier.calibration.progress.LOG_SECONDS", 0.0)
    compress(load(llama), [NBLModifier(num_layers=2)], token_rows())
    lines = [line for line in logged if line.startswith("NBL: measuring, ")]
    assert len(lines) > 3


def test_bars_are_back_after_a_run_that_failed(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(
        "nbl_modifier.calibration.observer.LayerStatistics.update", fail
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        compress(load(llama), [NBLModifier(num_layers=1)], token_rows())
    monkeypatch.undo()
    compress(load(llama), [NBLModifier(num_layers=1)], token_rows())
    assert pipeline.tqdm is tqdm
