"""
vLLM treats a linearized model as it does the base model: nothing that it decides by the
name of a model's class or type is lost.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from integration_tests.harness import serve_python, vllm_environment
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.configuration_nbl import (
    LinearizedLayer,
    config_class,
    nbl_config_block,
)
from tests.tiny_models import family_config, with_attention

pytestmark = [pytest.mark.requires_vllm, pytest.mark.slow]

# What names the model, or is made of what does.
NAMES = {
    "model_config.model",
    "model_config.model_weights",
    "model_config.tokenizer",
    "model_config.served_model_name",
    "model_config.hf_config",
    "model_config.hf_text_config",
    "model_config.hf_config_path",
    "model_config.model_arch_config",
}
# Names again, and the class and configuration that they lead to.
NAMES |= {f"model_config.{name}" for name in ("architecture", "architectures")}


def save(folder: Path, family: str, linearized: bool) -> str:
    """Write the configuration of a family's model, all that vLLM needs here."""
    row = ARCHITECTURES[family]
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
    }
    fields = family_config(family, **sizes).to_dict()
    fields |= {"architectures": [row.causal_lm], "dtype": "bfloat16"}
    if linearized:
        spec = LinearizedLayer(input=row.inputs[-1])
        index = with_attention(family, 4)[0]
        fields |= {
            "architectures": [row.nbl_causal_lm],
            "model_type": config_class(row).model_type,
            "nbl_config": nbl_config_block({index: spec}),
        }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(folder)


def test_every_family_is_configured_as_its_base_model(tmp_path: Path) -> None:
    families = sorted(ARCHITECTURES)
    folders = {
        (family, linearized): save(
            tmp_path / f"{family}-{linearized}", family, linearized
        )
        for family in families
        for linearized in (False, True)
    }
    worker = Path(__file__).with_name("resolve_configurations.py")
    run = subprocess.run(
        [serve_python(), str(worker), *folders.values()],
        capture_output=True,
        text=True,
        env=vllm_environment(tmp_path),
        cwd=Path(__file__).parents[1],
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("RESOLVED ")]
    assert len(answers) == 1, run.stderr[-2000:]
    found = json.loads(answers[0].removeprefix("RESOLVED "))
    different = {
        f"{family}: {name}": (base[name], mine[name])
        for family in families
        for base, mine in [
            [found[folders[family, is_mine]] for is_mine in (False, True)]
        ]
        for name in base.keys() | mine.keys()
        if name not in NAMES
        if base[name].replace(folders[family, False], "")
        != mine[name].replace(folders[family, True], "")
    }
    assert not different
