"""
Whoever cannot serve a linearized checkpoint right says so, and makes no tokens; and the
model card says what to do about it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nbl_modifier.hf

pytestmark = pytest.mark.requires_vllm

Checkpoint = Callable[[str], Path]
Raw = Callable[..., Any]

CUSTOM_CODE = "contains custom code which must be executed"
UNKNOWN_TYPE = "model type `nbl_llama` but Transformers does not recognize"
NO_ATTENTION = "does not dispatch through the Transformers attention interface"
NO_CODE: dict[str, Any] = {"auto_map": None}


def nbl(**fields: object) -> str:
    """Return a recipe of NBL alone."""
    modifiers = {"NBLModifier": fields}
    return yaml.safe_dump({"default_stage": {"default_modifiers": modifiers}})


@pytest.fixture(scope="session")
def linearized(checkpoint: Checkpoint) -> Path:
    """Return a checkpoint with six linear layers."""
    return checkpoint(nbl(num_layers=6))


def edited(directory: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """Return a copy of a checkpoint with entries of its ``config.json`` changed."""
    copy = shutil.copytree(directory, folder / "edited")
    path = copy / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return copy


@dataclass(frozen=True)
class Refusal:
    """
    A way to ask vLLM for a checkpoint that must fail.

    :param message: part of what the user reads
    :param changes: entries of ``config.json``; None removes one
    :param engine: arguments of ``vllm.LLM``
    :param plugin: whether nbl_modifier's plugin is there
    :param slow: left out of ``make test``
    """

    message: str
    changes: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    plugin: bool = False
    slow: bool = True


TRUST: dict[str, Any] = {"trust_remote_code": True}
TRANSFORMERS: dict[str, Any] = {"model_impl": "transformers"}
AS_LLAMA: dict[str, Any] = {"model_type": "llama", "auto_map": None}
REFUSALS = {
    "as_saved": Refusal(CUSTOM_CODE, slow=False),
    # vLLM's fallback to transformers' own model wants attention in every layer.
    "trusted": Refusal(NO_ATTENTION, engine=TRUST, slow=False),
    "trusted_transformers": Refusal(NO_ATTENTION, engine=TRUST | TRANSFORMERS),
    "transformers": Refusal(CUSTOM_CODE, engine=TRANSFORMERS),
    "no_code": Refusal(UNKNOWN_TYPE, NO_CODE, slow=False),
    "no_code_transformers": Refusal(UNKNOWN_TYPE, NO_CODE, TRANSFORMERS),
    "plugin_transformers": Refusal(
        "is not a registered model", NO_CODE, TRANSFORMERS, plugin=True
    ),
    "plugin_trusted_transformers": Refusal(
        NO_ATTENTION, engine=TRUST | TRANSFORMERS, plugin=True
    ),
    # Edited to look like the base model's, as no version of this package writes it.
    "class_of_ours": Refusal("are not supported for now", AS_LLAMA),
    "as_the_base": Refusal(
        "There is no module or parameter named",
        AS_LLAMA | {"architectures": ["LlamaForCausalLM"]},
    ),
    "as_the_base_with_plugin": Refusal(
        "There is no module or parameter named",
        AS_LLAMA | {"architectures": ["LlamaForCausalLM"]},
        plugin=True,
    ),
}


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if case.slow else [])
        for name, case in REFUSALS.items()
    ],
)
def test_vllm_refuses(
    linearized: Path, raw: Raw, tmp_path: Path, refusal: Refusal
) -> None:
    directory = linearized
    if refusal.changes:
        directory = edited(linearized, tmp_path, refusal.changes)
    environment = {} if refusal.plugin else {"VLLM_PLUGINS": ""}
    result, log = raw(directory, engine=refusal.engine, environment=environment)
    assert result.keys() == {"error"}
    output = result["error"] + log.read_text(encoding="utf-8", errors="replace")
    assert refusal.message in output


@pytest.mark.parametrize("edit", ["missing", "surplus"])
def test_vllm_refuses_other_tensors(
    linearized: Path, raw: Raw, tmp_path: Path, edit: str
) -> None:
    """A map that is not in the file, and attention beside one."""
    directory = edited(linearized, tmp_path, {})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    name = f"model.layers.{min(map(int, config['nbl_config']['layers']))}.self_attn"
    tensors = load_file(directory / "model.safetensors")
    if edit == "missing":
        del tensors[f"{name}.linear.weight"]
        message = f"{name}: what replaced it needs the tensor {name}.linear.weight"
    else:
        tensors[f"{name}.q_proj.weight"] = tensors[f"{name}.linear.weight"].clone()
        message = f"{name}: what replaced it has no tensor {name}.q_proj.weight"
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    result, log = raw(directory)
    assert result.keys() == {"error"}
    output = result["error"] + log.read_text(encoding="utf-8", errors="replace")
    assert message in output
    assert str(directory) in output


@pytest.mark.parametrize("message", [CUSTOM_CODE, NO_ATTENTION])
def test_model_card_leads_to_the_fix(linearized: Path, message: str) -> None:
    """What an untouched checkpoint is refused with stands there, and the remedy."""
    card = " ".join((linearized / "README.md").read_text(encoding="utf-8").split())
    assert message in card
    assert "pip install nbl-modifier" in card


LOAD = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("nbl_modifier") is None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
print(model.generate(torch.arange(5, 25)[None], max_new_tokens=16).tolist())
"""


def load_without_nbl_modifier(
    directory: Path, folder: Path, **kwargs: object
) -> subprocess.CompletedProcess[str]:
    """
    Generate from a checkpoint where nbl_modifier is not installed.

    The interpreter is the one that this environment was made from; it finds the
    installed packages, but not those that are installed as a reference to a folder.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    packages = [path for path in sys.path if path.endswith("site-packages")]
    paths = {
        "PYTHONPATH": os.pathsep.join(packages),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    return subprocess.run(
        [sys._base_executable, "-c", LOAD, str(directory), json.dumps(kwargs)],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environment | paths,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, CUSTOM_CODE), (NO_CODE, UNKNOWN_TYPE)],
    ids=["as_saved", "no_code"],
)
def test_transformers_refuses(
    linearized: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    directory = edited(linearized, tmp_path, changes)
    process = load_without_nbl_modifier(directory, tmp_path)
    assert process.returncode != 0
    assert message in process.stderr


def test_transformers_with_the_modelling_files(
    linearized: Path, tmp_path: Path
) -> None:
    process = load_without_nbl_modifier(linearized, tmp_path, trust_remote_code=True)
    assert process.returncode == 0, process.stderr
    nbl_modifier.hf.register()
    model: Any = AutoModelForCausalLM.from_pretrained(linearized)
    expected = model.generate(torch.arange(5, 25)[None], max_new_tokens=16)
    assert json.loads(process.stdout) == expected.tolist()


def test_all_linear_with_prefix_caching(checkpoint: Checkpoint, raw: Raw) -> None:
    result, _ = raw(checkpoint(nbl(num_layers=16)))
    assert result.keys() == {"error"}
    assert "--no-enable-prefix-caching" in result["error"]


@pytest.mark.slow  # two workers on two cores
def test_pipeline_stage_without_attention(checkpoint: Checkpoint, raw: Raw) -> None:
    late = checkpoint(nbl(layers=list(range(8, 16))))
    result, log = raw(late, engine={"pipeline_parallel_size": 2}, in_process=False)
    assert result.keys() == {"error"}
    text = log.read_text(encoding="utf-8", errors="replace")
    assert "stage 1: layers 8 to 15" in text
    assert "VLLM_PP_LAYER_PARTITION" in text
