"""What vLLM's CPU build cannot run: it says so, with NBL and without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from integration_tests.conftest import Materials
from integration_tests.reference import prompt_logprobs

# Two calibrations and two engines per scheme, to show that a limit is not ours.
pytestmark = [pytest.mark.requires_vllm, pytest.mark.slow]


def recipe(scheme: str, nbl: bool) -> str:
    """Return a recipe that quantizes by ``scheme``, after NBL or alone."""
    modifiers: dict[str, Any] = {"NBLModifier": {"num_layers": 4}} if nbl else {}
    modifiers["QuantizationModifier"] = {
        "scheme": scheme,
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    return yaml.safe_dump(
        {"default_stage": {"default_modifiers": modifiers}}, sort_keys=False
    )


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("FP8", "static_scaled_fp8_quant"),
        ("W8A16", "uint8b128"),
        ("NVFP4A16", "Marlin FP4 not available"),
    ],
)
@pytest.mark.parametrize("nbl", [True, False], ids=["nbl", "base"])
def test_scheme_needs_a_gpu(
    checkpoint: Callable[[str], Path],
    raw: Callable[..., Any],
    scheme: str,
    message: str,
    nbl: bool,
) -> None:
    directory = checkpoint(recipe(scheme, nbl))
    result, log = raw(directory, engine={"dtype": "bfloat16"})
    assert result.keys() == {"error"}
    assert message in result["error"] + log.read_text(encoding="utf-8")


def test_latent_attention_has_wrong_positions(
    made: Materials, raw: Callable[..., Any]
) -> None:
    """
    The kernel for rotary embeddings takes heads side by side; latent attention hands it
    a dimension of them (vllm 0.32.0, model_executor/layers/mla.py).
    """
    family = "deepseek_v3"
    model = made.model(family)
    expected = prompt_logprobs(model, "float32", family)
    for custom_ops, is_right in (([], False), (["-rotary_embedding"], True)):
        engine = {"dtype": "float32", "compilation_config": {"custom_ops": custom_ops}}
        result, _ = raw(model, family, engine=engine)
        found = torch.tensor(sum(result["logprobs"], []))
        assert ((found - expected).abs().max() < 1e-4) == is_right


def test_mamba_2_has_no_prefix_cache(made: Materials, raw: Callable[..., Any]) -> None:
    """
    States at the ends of chunks are looked up where there is one per sequence only
    (vllm 0.32.0, model_executor/layers/mamba/ops/cpu/mamba_ssm.py).
    """
    family = "granitemoehybrid"
    result, _ = raw(made.model(family), family, engine={"dtype": "float32"})
    assert "is out of bounds for dimension 0" in result["error"]
