# SPDX-License-Identifier: Apache-2.0
"""Families that not every test takes, from calibration to what is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import Tensor

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from tests.streams import assert_best_map
from tests.tiny_llama import compress, linearized, load, logits_of, tensors_in
from tests.tiny_models import (
    FAMILIES,
    SLIDING_WINDOW,
    THOROUGH,
    VOCAB_SIZE,
    save_tiny,
    with_attention,
)

pytestmark = pytest.mark.usefixtures("one_thread")

nbl_modifier.hf.register()

NUM_LAYERS = 4
OTHERS = [name for name in FAMILIES if name not in THOROUGH]
# The first and the last that have attention: one of each kind where there are two.
ENDS = {name: with_attention(name, NUM_LAYERS)[:: NUM_LAYERS - 1] for name in OTHERS}
ENDS |= {
    name: with_attention(name, NUM_LAYERS)
    for name in OTHERS
    if len(with_attention(name, NUM_LAYERS)) < NUM_LAYERS
}
# Experts are chosen as before. Those of gpt-oss have no names of their own on disk.
NOT_QUANTIZED = ["lm_head", "re:.*gate$", "re:.*router.*", "re:.*vision.*"]
NOT_QUANTIZED += ["re:.*projector.*"]
FUSED = {"gpt_oss": ["re:.*experts.*"]}


@pytest.mark.parametrize("model_type", OTHERS)
def test_family(model_type: str, rows: Dataset, tmp_path: Path) -> None:
    """Calibrated, quantized, saved, read again, and run with each kind of cache."""
    row = ARCHITECTURES[model_type]
    source = save_tiny(tmp_path / "base", model_type, num_layers=NUM_LAYERS)
    nbl = NBLModifier(num_layers=2, input=row.inputs[-1], ignore=ignored(model_type))
    out = str(tmp_path / "out")
    model = compress(load(source), nbl, rows, batch_size=4, output_dir=out)
    assert nbl.report is not None
    assert linearized(model) == ENDS[model_type]
    assert all(layer.num_tokens == 1024 for layer in nbl.report.layers)
    assert nbl.report.kv_cache_left is not None

    first = min(nbl.report.layers, key=lambda layer: layer.index)
    eager = load(source, attn_implementation="eager")
    calibrated = torch.tensor(rows["input_ids"])
    assert_best_map(eager, model, row, row.inputs[-1], first, calibrated)
    assert not torch.allclose(logits_of(model), logits_of(eager))

    reloaded, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(reloaded).__name__ == row.nbl_causal_lm
    # Experts are apart in memory and one weight once reloaded: float32, other sums.
    found = logits_of(reloaded)
    torch.testing.assert_close(found, logits_of(model), rtol=0.0, atol=1e-5)

    prompt = tokens(SLIDING_WINDOW - 6)
    answer = generate(reloaded, prompt, use_cache=False)
    for cache in (None, "static"):
        assert torch.equal(
            generate(reloaded, prompt, cache_implementation=cache), answer
        )

    ignore = NOT_QUANTIZED + FUSED.get(model_type, [])
    quantized = QuantizationModifier(scheme="W8A8", targets="Linear", ignore=ignore)
    again = NBLModifier(layers=ENDS[model_type], input=row.inputs[-1])
    out = str(tmp_path / "w8a8")
    model = compress(
        load(source), [again, quantized], rows, batch_size=4, output_dir=out
    )
    name = f"{row.attention_name(ENDS[model_type][0])}.linear"
    assert model.get_submodule(name).quantization_scheme is not None
    # Of a model that sees images they have other names on disk.
    short = name[name.index("layers.") :]
    stored = tensors_in(tmp_path / "w8a8")
    (weight,) = (w for key, w in stored.items() if key.endswith(f".{short}.weight"))
    assert weight.dtype == torch.int8
    experts = hasattr(model.config, "num_experts_per_tok") and model_type not in FUSED
    if not experts and model_type != "mistral3":
        reloaded = load(tmp_path / "w8a8")
        found = logits_of(reloaded)
        torch.testing.assert_close(found, logits_of(model), rtol=0.0, atol=1e-4)
    # else transformers 5.17 looks for experts that are not quantized, or takes what is
    # not quantized in Mistral 3 for quantized, NBL or not


def ignored(model_type: str) -> list[str]:
    """Return the attention that is kept, so that two layers are left to choose."""
    row = ARCHITECTURES[model_type]
    kept = set(with_attention(model_type, NUM_LAYERS)) - set(ENDS[model_type])
    return [row.attention_name(index) for index in kept]


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, VOCAB_SIZE, (2, length), generator=generator)


def generate(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    output = model.generate(inputs, do_sample=False, max_new_tokens=12, **kwargs)
    return output[:, inputs.shape[1] :]


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "granitemoehybrid"])
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_recurrent_layers_are_not_replaced(
    model_type: str, kind: Any, rows: Dataset, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "base", model_type)
    model = load(source)
    nbl = NBLModifier(num_layers=2, kind=kind)
    compress(model, nbl, rows)
    assert nbl.report is not None
    assert nbl.report.selected_layers == with_attention(model_type, NUM_LAYERS)
    with pytest.raises(ValueError, match=r"2 layers to choose from free 0\."):
        compress(load(source), NBLModifier(kv_cache_reduction=1.0, kind=kind), rows)
    with pytest.raises(ValueError, match=r"layers: \[0\] are not among .* \[1, 3\]"):
        compress(load(source), NBLModifier(layers=[0], kind=kind), rows)


def test_shared_keys_and_values_are_refused(rows: Dataset, tmp_path: Path) -> None:
    """Of Gemma 4's small models, whose last layers read those of earlier ones."""
    model = load(save_tiny(tmp_path / "base", "gemma4_text"))
    model.config.num_kv_shared_layers = 2
    with pytest.raises(NotImplementedError, match="its last 2 layers read keys"):
        compress(model, NBLModifier(num_layers=1), rows)
