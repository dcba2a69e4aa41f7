# SPDX-License-Identifier: Apache-2.0
"""What checkpoints must hold to be loaded, and what models that were loaded save."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.loading_nbl import MODELLING_CODE, check_tensors
from tests.followers import TinyModels
from tests.tiny_llama import compress, load, logits_of, tensors_in

pytestmark = pytest.mark.usefixtures("one_thread")

ABILITIES = """
import transformers
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.modeling_nbl import model_class

QUESTIONS = ("_can_set_attn_implementation", "_can_set_experts_implementation")
for number, architecture in enumerate(ARCHITECTURES.values()):
    for name in (architecture.causal_lm, architecture.base_model):
        stock, ours = getattr(transformers, name), model_class(name, architecture)
        asked = [stock, ours, stock] if number % 2 else [ours, stock, ours]
        for question in QUESTIONS:
            answers = [getattr(each, question)() for each in asked]
            assert answers[0] == answers[1] == answers[2], (name, question, answers)
"""


def test_abilities_are_those_of_the_stock_model() -> None:
    """
    Whichever class is asked first: transformers keeps answers, and hands them down.

    In a process of its own, where none has been asked yet.
    """
    run = subprocess.run(
        [sys.executable, "-c", ABILITIES], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


# --- tensors that are not there, or too many ------------------------------------------

ATTENTION = "model.layers.1.self_attn"
RECIPES: dict[str, dict[str, Any]] = {
    "attention": {},
    "drop": {"method": "drop"},
    "low_rank": {"rank": 8},
    "block": {"kind": "block"},
}
# recipe, and the tensor to be taken out (-) or put in (+)
WRONG = [
    ("attention", f"-{ATTENTION}.linear.weight"),
    ("attention", f"-{ATTENTION}.linear.bias"),
    ("attention", f"+{ATTENTION}.q_proj.weight"),
    ("attention", "+model.layers.1.input_layernorm.weight"),
    ("drop", f"+{ATTENTION}.linear.weight"),
    ("drop", f"+{ATTENTION}.o_proj.weight"),
    ("low_rank", f"-{ATTENTION}.linear.reduce.weight"),
    ("block", "-model.layers.1.linear.weight"),
    ("block", "+model.layers.1.mlp.up_proj.weight"),
]


@pytest.fixture(scope="module")
def checkpoints(
    llama: Path, rows: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return a checkpoint with layer 1 replaced for each of ``RECIPES``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, fields in RECIPES.items():
        recipe = NBLModifier(layers=[1], **fields)
        compress(load(llama), recipe, rows, output_dir=str(folder / name))
    return {name: folder / name for name in RECIPES}


def edited(source: Path, folder: Path, edit: str) -> Path:
    """Return a copy of a checkpoint with one tensor less (``-NAME``) or more."""
    shutil.copytree(source, folder)
    tensors: dict[str, Tensor] = tensors_in(folder)
    name = edit[1:]
    if edit[0] == "-":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(32, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("recipe", "edit"), WRONG, ids=str)
def test_tensors_of_replaced_layers_are_all_there_is(
    checkpoints: dict[str, Path], tmp_path: Path, recipe: str, edit: str
) -> None:
    folder = edited(checkpoints[recipe], tmp_path / "edited", edit)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"layers\.1.*what replaced it") as error:
            auto_class.from_pretrained(folder)
        # of a model without a head, names start one level further in
        assert edit[1:].removeprefix("model.") in str(error.value)
        assert str(folder) in str(error.value)


def test_incomplete_checkpoint_is_not_compressed_again(
    checkpoints: dict[str, Path], rows: Dataset, tmp_path: Path
) -> None:
    edit = f"-{ATTENTION}.linear.weight"
    folder = edited(checkpoints["attention"], tmp_path / "edited", edit)
    with pytest.raises(ValueError, match=f"{ATTENTION}: what replaced it needs"):
        compress(folder, NBLModifier(layers=[2]), rows, output_dir=str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_checkpoints_load(checkpoints: dict[str, Path], recipe: str) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoints[recipe])
    AutoModel.from_pretrained(checkpoints[recipe])


def test_other_tensors_are_none_of_our_business() -> None:
    """Scales of a quantized map, and whatever belongs to the rest of the layer."""
    check_tensors(
        "model.layers.1.",
        ARCHITECTURES["llama"],
        LinearizedLayer(),
        missing=["model.layers.1.mlp.up_proj.weight"],
        found=[f"{ATTENTION}.linear.weight_zero_point", "model.layers.10.x"],
        checkpoint="folder",
    )


# --- saved by transformers alone ------------------------------------------------------


def test_saved_again_with_its_modelling_files(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As after merging an adapter: without llm-compressor in between."""
    source, out = checkpoints["attention"], tmp_path / "out"
    model = load(source)
    model.save_pretrained(out)
    for code in MODELLING_CODE:
        text = (source / code.name).read_text(encoding="utf-8")
        assert (out / code.name).read_text(encoding="utf-8") == text
        assert "nbl_modifier.arch" not in text.partition("__all__")[0]
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (source, out)
    )
    assert after["auto_map"] == before["auto_map"]
    assert after["nbl_config"] == before["nbl_config"]
    assert torch.equal(logits_of(load(out)), logits_of(model))


def test_other_processes_do_not_write(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = load(checkpoints["attention"])
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not list(tmp_path.glob("out/*.py"))
    with pytest.raises(NotImplementedError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)


# --- stock classes, named by hand -----------------------------------------------------

STOCK = """
import sys, transformers
for directory, *names in (line.split() for line in sys.stdin):
    for name in names:
        try:
            getattr(transformers, name).from_pretrained(directory)
        except Exception as err:
            words = "nbl_modifier" in str(err) and "trust_remote_code" in str(err)
            print(directory, name, "refused" if words else repr(err))
        else:
            print(directory, name, "loaded")
"""


def test_stock_classes_refuse_linearized_checkpoints(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path
) -> None:
    """They ignore ``model_type``, and would invent attention; without our package."""
    asked = []
    for model_type, architecture in ARCHITECTURES.items():
        base, saved = tiny_models(model_type), tmp_path / model_type
        recipe = NBLModifier(layers=[1], input=architecture.inputs[0])
        compress(load(base), recipe, rows, output_dir=str(saved))
        config = CONFIG_MAPPING[model_type].__name__
        names = (config, architecture.causal_lm, architecture.base_model)
        asked.append((saved, names, "refused"))
        asked.append((base, names, "loaded"))
        assert AutoConfig.from_pretrained(saved).return_dict is True
    run = subprocess.run(
        [sys.executable, "-c", STOCK],
        input="".join(f"{folder} {' '.join(names)}\n" for folder, names, _ in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        f"{folder} {name} {answer}" for folder, names, answer in asked for name in names
    ]
