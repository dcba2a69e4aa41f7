# SPDX-License-Identifier: Apache-2.0
"""PEFT on linearized models as on stock ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from tests.tiny_llama import Model, compress, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(
    llama: Path, rows: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    nbl_modifier.hf.register()
    folder = tmp_path_factory.mktemp("adapters") / "nbl"
    compress(load(llama), NBLModifier(layers=[0, 2]), rows, output_dir=str(folder))
    return folder


def adapted(model: Model) -> set[str]:
    return {
        name for name, module in model.named_modules() if hasattr(module, "base_layer")
    }


def test_default_targets_are_the_base_models(llama: Path, checkpoint: Path) -> None:
    stock, ours = (
        get_peft_model(load(folder), LoraConfig(task_type=TaskType.CAUSAL_LM))
        for folder in (llama, checkpoint)
    )
    kept = {name for name in adapted(stock) if ".1." in name or ".3." in name}
    assert adapted(ours) == kept
    assert kept


def test_every_family_that_peft_knows_keeps_its_defaults() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    nbl_modifier.hf.register()
    defaults: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for architecture in ARCHITECTURES.values():
        mine = defaults.get(architecture.nbl_model_type)
        assert mine == defaults.get(architecture.model_type)


def test_prefix_tuning(checkpoint: Path) -> None:
    """A prefix in the cache of every layer: seen by those that have attention."""
    settings = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    base = load(checkpoint)
    model = get_peft_model(base, settings).eval()
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        logits = model(tokens).logits
    assert logits.shape == plain.shape
    assert (logits - plain).abs().max() > 1e-3
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    generated = model.generate(input_ids=tokens, pad_token_id=0, **options)
    # The first token is what one pass predicts, the others follow it in the cache.
    with torch.no_grad():
        again = model(generated[:, :-1]).logits.argmax(-1)
    assert torch.equal(again[:, tokens.shape[1] - 1 :], generated[:, tokens.shape[1] :])
