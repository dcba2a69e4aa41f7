# SPDX-License-Identifier: Apache-2.0
"""benchmarks/statistics_files.py: sizes are those of the files, nothing is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from datasets import Dataset

from benchmarks.statistics_files import report
from nbl_modifier import NBLModifier
from tests.tiny_llama import compress, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["attention", "block"])
def test_table(
    llama: Path, rows: Dataset, tmp_path: Path, kind: Literal["attention", "block"]
) -> None:
    modifier = NBLModifier(num_layers=1, kind=kind, statistics=str(tmp_path))
    compress(load(llama), modifier, rows)
    table = report(str(llama), [tmp_path], 2)
    lines = (" ".join(line.split()) for line in table.splitlines())
    header, _, model, statistics = lines
    assert header.startswith("| | layers | MB | over the model |")
    weights, total = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for folder in (llama, tmp_path)
    )
    assert model.startswith(f"| model, float32 | 4 | {weights / 1e6:.0f} | 1.00 |")
    row = f"| statistics, {kind}, input residual | 4 | {total / 1e6:.0f} | "
    assert statistics.startswith(f"{row}{total / weights:.2f} |")
