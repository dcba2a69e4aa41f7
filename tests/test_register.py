"""The one incantation: after it, both hosts know what is ours."""

import subprocess
import sys

import pytest

_LOADS = """
from transformers import AutoConfig
from nbl_modifier.architectures import ARCHITECTURES
for architecture in ARCHITECTURES.values():
    assert AutoConfig.for_model(architecture.nbl_model_type)
"""
_REPLAYS = """
from llmcompressor.recipe import Recipe
recipe = "default_stage: {default_modifiers: {NBLModifier: {num_layers: 1}}}"
(modifier,) = Recipe.create_instance(recipe).modifiers
assert type(modifier).__name__ == "NBLModifier"
"""


@pytest.mark.parametrize("compresses", [True, False], ids=["compress", "serve"])
def test_after_register_hosts_know_it(compresses: bool) -> None:
    """Also where llm-compressor is not installed."""
    without = "" if compresses else "import sys; sys.modules['llmcompressor'] = None\n"
    code = (
        f"{without}import nbl_modifier\n"
        "nbl_modifier.register()\nnbl_modifier.register()\n"
        f"{_LOADS}{_REPLAYS if compresses else ''}"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
