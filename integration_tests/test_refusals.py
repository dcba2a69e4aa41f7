"""Whoever cannot serve a linearized checkpoint right says so, and makes no tokens."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

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


def test_vllm_without_the_plugin(linearized: Path, tmp_path: Path) -> None:
    result = run_worker(
        linearized, tmp_path / "log", engine={}, environment={"VLLM_PLUGINS": ""}
    )
    assert result.keys() == {"error"}
    assert "model type `nbl_llama`" in result["error"]
    assert "does not recognize this architecture" in result["error"]


def test_transformers_without_nbl_modifier(linearized: Path) -> None:
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(linearized)], capture_output=True, text=True
    )
    assert process.returncode != 0
    assert "model type `nbl_llama`" in process.stderr
    assert "does not recognize this architecture" in process.stderr


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
