# SPDX-License-Identifier: Apache-2.0
"""
``examples/lora_recovery.py``: training makes the model better, touches what it should,
and leaves an ordinary linearized checkpoint.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import load_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.records.compression import NBLReport
from tests.tiny_llama import (
    DEMO_MODEL,
    compress,
    demo_tokenizer,
    linearized,
    load,
    tensors_in,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.begin]

SCRIPT = Path(__file__).parents[1] / "examples" / "lora_recovery.py"
LAYERS = [0, 5, 8, 11, 13, 15]
# Seconds instead of minutes; ten times the rate makes up for the few steps.
SHORT = {
    "--num-windows": "32",
    "--heldout-windows": "16",
    "--epochs": "1",
    "--learning-rate": "1e-3",
    "--rank": "8",
    "--alpha": "16",
}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo model with six layers linearized."""
    folder = tmp_path_factory.mktemp("checkpoint") / "nbl"
    rows = pack(load_texts("stdlib", "calibration"), demo_tokenizer(), 256, 16)
    compress(DEMO_MODEL, NBLModifier(layers=LAYERS), rows, output_dir=str(folder))
    return folder


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Return a function that runs the script and returns what it prints."""

    def run_script(checkpoint: Path, output: Path, *flags: str, **options: str) -> str:
        arguments = SHORT | {"--checkpoint": str(checkpoint), "--output": str(output)}
        arguments |= {f"--{name.replace('_', '-')}": v for name, v in options.items()}
        words = [word for pair in arguments.items() for word in pair]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, *flags])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        if end.value.code != 0:
            return str(end.value.code)
        return capsys.readouterr().out

    return run_script


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of the weights that differ."""
    old, new = tensors_in(before), tensors_in(after)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_trained_checkpoint(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out"
    text = run(checkpoint, output, "--control")
    row = r"^  (\w+(?: \+ LoRA)?) +\S+ +(\S+) \+- (\S+) times NBL$"
    ratios = {
        name: (float(ratio), float(error))
        for name, ratio, error in re.findall(row, text, re.MULTILINE)
    }
    assert list(ratios) == ["base", "NBL", "NBL + LoRA", "base + LoRA"]
    ratio, error = ratios["NBL + LoRA"]
    assert ratio + 3 * error < 1
    assert ratios["base + LoRA"] != ratios["base"]

    names = {f"model.layers.{i}.self_attn.linear.weight" for i in LAYERS}
    assert changed(checkpoint, output) == names
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (checkpoint, output)
    )
    assert after == before
    files = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in output.iterdir()} == files
    assert (output / "recipe.yaml").read_text() == (
        checkpoint / "recipe.yaml"
    ).read_text()
    report = NBLReport.load(output / "nbl_report.json")
    assert report.selected_layers == LAYERS
    assert report.training is not None
    assert "rank 8, alpha 16" in report.training
    assert f"{32 * 256:,} tokens of stdlib, seed 0" in report.training
    assert report.training in (output / "README.md").read_text()
    nbl_modifier.hf.register()
    assert linearized(load(output)) == LAYERS


def test_target_of_ones_own(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out"
    run(checkpoint, output, target=r".*layers\.[01]\.mlp\.down_proj")
    names = {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert changed(checkpoint, output) == names


def test_checkpoint_is_made_if_there_is_none(tmp_path: Path, run: Run) -> None:
    checkpoint, output = tmp_path / "nbl", tmp_path / "out"
    run(checkpoint, output, num_layers="2")
    nbl_modifier.hf.register()
    assert len(linearized(load(output))) == 2
    assert len(changed(checkpoint, output)) == 2
    assert (output / "recipe.yaml").read_text() == (
        checkpoint / "recipe.yaml"
    ).read_text()


def test_what_cannot_work_is_refused_first(
    checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "out"
    assert "no linearized --base" in run(DEMO_MODEL, output)
    quantized = tmp_path / "quantized"
    recipe = QuantizationModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"])
    rows = pack(load_texts("stdlib", "calibration"), demo_tokenizer(), 256, 4)
    compress(checkpoint, recipe, rows, output_dir=str(quantized))
    assert "is quantized" in run(quantized, output)
    assert not output.exists()
    shutil.copytree(DEMO_MODEL, tmp_path / "taken")
    with pytest.raises(FileExistsError, match="holds another model"):
        run(checkpoint, tmp_path / "taken")
