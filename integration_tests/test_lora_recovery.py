"""
What ``examples/lora_recovery.py`` saves is an ordinary checkpoint: vLLM serves the
trained weights as transformers does, with the KV cache of the checkpoint it started at.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from integration_tests.conftest import Materials
from integration_tests.harness import Served
from integration_tests.reference import reference
from integration_tests.rows import DEMO_MODEL, ROOT, rows

pytestmark = pytest.mark.requires_vllm

SCRIPT = ROOT / "examples" / "lora_recovery.py"
# Its checkpoint and engine, which other tests have made.
(START,) = (row.values[0] for row in rows() if row.id == "dense_residual_float32")
# Seconds instead of minutes.
SHORT = {
    "--num-windows": "32",
    "--heldout-windows": "2",
    "--epochs": "1",
    "--learning-rate": "1e-3",
}


def test_trained_checkpoint_is_served(
    made: Materials, engine: Callable[..., Served], tmp_path: Path
) -> None:
    start, trained = made.checkpoint(START.recipe_text), tmp_path / "trained"
    arguments = SHORT | {"--checkpoint": str(start), "--output": str(trained)}
    command = [sys.executable, str(SCRIPT)]
    for name, value in arguments.items():
        command += [name, value]
    subprocess.run(command, check=True, cwd=tmp_path)

    before = engine(start, engine={"dtype": START.dtype})
    after = engine(trained, engine={"dtype": START.dtype})
    expected = reference(trained, START.dtype, DEMO_MODEL)
    assert after.tokens == expected.tokens
    bound = START.expect["logprobs"]["max"]
    assert (after.logprobs - expected.logprobs).abs().max() <= bound
    assert (after.logprobs - before.logprobs).abs().max() > 100 * bound
    assert after.architecture == before.architecture
    assert after.linears == before.linears
    assert after.kv_cache_tokens == before.kv_cache_tokens
