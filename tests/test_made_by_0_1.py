# SPDX-License-Identifier: Apache-2.0
"""
Files that version 0.1 wrote (commit 0f3852f) work unchanged.

``data/v0_1`` has a random Llama of three layers, its checkpoint with one layer
replaced, the statistics of that run, and logits that 0.1 computed with the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
from tests.tiny_llama import compress, load, logits_of, tensors_in, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")

OLD = Path(__file__).parent / "data" / "v0_1"
WITHOUT_PACKAGE = """
import sys
sys.modules["nbl_modifier"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__)
"""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, beside which paths in the files lead to where they led."""
    shutil.copytree(OLD, tmp_path / "v0_1")
    monkeypatch.chdir(tmp_path)
    return Path("v0_1")


def expected() -> torch.Tensor:
    return torch.tensor(json.loads((OLD / "logits.json").read_text(encoding="utf-8")))


def test_checkpoints_load(old: Path) -> None:
    nbl_modifier.hf.register()
    logits = logits_of(load(old / "checkpoint"))[:, :6, :4]
    assert_close(logits, expected(), rtol=1e-4, atol=1e-4)
    report = NBLReport.load(old / "checkpoint" / REPORT_FILE_NAME)
    assert report.num_replaced == 1


def test_checkpoints_load_by_the_code_they_carry(old: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(old / "checkpoint")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "NBLLlamaForCausalLM"


def test_statistics_are_used(old: Path) -> None:
    """And give the layer and the map that they gave 0.1."""
    recipe = NBLModifier(num_layers=1, statistics=str(old / "statistics"))
    compress(load(old / "model"), recipe, token_rows(16, 64), output_dir="new")
    found, before = tensors_in(Path("new")), tensors_in(old / "checkpoint")
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("statistics", ["kept", "gone"])
def test_recipes_are_replayed(old: Path, logged: list[str], statistics: str) -> None:
    """As they are, with one warning, and with the statistics that they name or not."""
    if statistics == "gone":
        shutil.rmtree(old / "statistics")
    recipe = str(old / "checkpoint" / "recipe.yaml")
    compress(load(old / "model"), recipe, token_rows(16, 64), output_dir="again")
    (warning,) = (text for text in logged if "names of 0.1" in text)
    for now in ("method: ", "distill: {epochs", "distill: {rate", "is now statistics"):
        assert now in warning
    assert (old / "statistics" / "statistics.json").exists()
    found, before = tensors_in(Path("again")), tensors_in(old / "checkpoint")
    for name, tensor in before.items():
        assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
