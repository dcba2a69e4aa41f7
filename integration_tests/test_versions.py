"""What the plugin does about vLLM's version, and what we do about its command."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

from integration_tests.harness import serve_python, vllm_environment
from integration_tests.rows import ROOT

pytestmark = pytest.mark.requires_vllm

REGISTER_TWICE = """
from nbl_modifier.vllm_plugin import register, versions
from vllm import ModelRegistry
if {untested}:
    versions.TESTED_VLLM = ((0, 1), (0, 2))
register()
register()
print("NBLLlamaForCausalLM" in ModelRegistry.get_supported_archs())
"""
# vLLM's command, for which no distribution is called "vllm".
WITHOUT_SHIM = """
import importlib.metadata, sys
known = importlib.metadata.version
def version(name):
    if name == "vllm":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
sys.argv = ["vllm", "--version"]
from vllm.entrypoints.cli.main import main
main()
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in the serve environment."""
    return subprocess.run(
        [serve_python(), "-c", code],
        env=vllm_environment(folder) | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("untested", [False, True])
def test_another_vllm_warns_once_and_goes_on(untested: bool, tmp_path: Path) -> None:
    done = run(REGISTER_TWICE.format(untested=untested), tmp_path)
    assert done.returncode == 0, done.stdout
    warnings = done.stdout.count("nbl_modifier is tested with vLLM 0.1 to 0.2, this is")
    assert warnings == int(untested)
    assert "nbl_modifier is tested with vLLM 0.3" not in done.stdout
    assert done.stdout.splitlines()[-1] == "True"


def test_command_still_needs_the_shim(tmp_path: Path) -> None:
    """A failure is good news: remove requirements/vllm_cli_shim and this test."""
    done = run(WITHOUT_SHIM, tmp_path)
    assert done.returncode != 0
    assert "PackageNotFoundError: No package metadata was found for vllm" in done.stdout
    shim = ROOT / "requirements" / "vllm_cli_shim" / "pyproject.toml"
    assert tomllib.loads(shim.read_text("utf-8"))["project"]["name"] == "vllm"
