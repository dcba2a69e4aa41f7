"""Whoever cannot serve a linearized checkpoint right says so, and makes no tokens."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import nbl_modifier.hf
from integration_tests.harness import run_worker

pytestmark = pytest.mark.requires_vllm

Checkpoint = Callable[[str], Path]


def nbl(**fields: object) -> str:
    """Return a recipe of NBL alone."""
    modifiers = {"NBLModifier": fields}
    return yaml.safe_dump({"default_stage": {"default_modifiers": modifiers}})


@pytest.fixture(scope="session")
def linearized(checkpoint: Checkpoint) -> Path:
    """Return a checkpoint with six linear layers."""
    return checkpoint(nbl(num_layers=6))


@pytest.mark.parametrize(
    ("trust_remote_code", "message"),
    [
        (False, "contains custom code which must be executed"),
        # vLLM's fallback to transformers' own model wants attention in every layer.
        (True, "does not dispatch through the Transformers attention interface"),
    ],
)
def test_vllm_without_the_plugin(
    linearized: Path, tmp_path: Path, trust_remote_code: bool, message: str
) -> None:
    result = run_worker(
        linearized,
        tmp_path / "log",
        engine={"trust_remote_code": trust_remote_code},
        environment={"VLLM_PLUGINS": ""},
    )
    assert result.keys() == {"error"}
    assert message in result["error"]


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
assert "nbl_modifier" not in sys.modules
print(model.generate(torch.arange(5, 25)[None], max_new_tokens=16).tolist())
"""


def load_without_nbl_modifier(
    directory: Path, modules: Path, **kwargs: object
) -> subprocess.CompletedProcess[str]:
    """Generate from a checkpoint in a process that never imports nbl_modifier."""
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(directory), repr(kwargs)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_MODULES_CACHE": str(modules)},
    )


def test_transformers_without_nbl_modifier(linearized: Path, tmp_path: Path) -> None:
    process = load_without_nbl_modifier(linearized, tmp_path)
    assert process.returncode != 0
    assert "contains custom code which must be executed" in process.stderr


def test_transformers_with_the_modelling_files(
    linearized: Path, tmp_path: Path
) -> None:
    process = load_without_nbl_modifier(linearized, tmp_path, trust_remote_code=True)
    assert process.returncode == 0, process.stderr
    nbl_modifier.hf.register()
    model: Any = AutoModelForCausalLM.from_pretrained(linearized)
    expected = model.generate(torch.arange(5, 25)[None], max_new_tokens=16)
    assert json.loads(process.stdout) == expected.tolist()


def test_all_linear_with_prefix_caching(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = run_worker(checkpoint(nbl(num_layers=16)), tmp_path / "log", engine={})
    assert result.keys() == {"error"}
    assert "--no-enable-prefix-caching" in result["error"]


@pytest.mark.slow  # two workers on two cores
def test_pipeline_stage_without_attention(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    late = checkpoint(nbl(layers=list(range(8, 16))))
    result = run_worker(late, log, engine={"pipeline_parallel_size": 2})
    assert result.keys() == {"error"}
    text = log.read_text(encoding="utf-8")
    assert "stage 1: layers 8 to 15" in text
    assert "VLLM_PP_LAYER_PARTITION" in text
