# SPDX-License-Identifier: Apache-2.0
"""What is read from configs and from the headers of weight files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.benchmark.shapes import (
    StoredTensor,
    load_model,
    products,
    stored_tensors,
)
from nbl_modifier.hf.configuration_nbl import (
    LinearizedLayer,
    config_class,
    nbl_config_block,
)
from tests.tiny_llama import FOUR_BITS, compress, load
from tests.tiny_models import THOROUGH, with_attention

if TYPE_CHECKING:
    from tests.followers import TinyModels


HYBRIDS = ["granitemoehybrid", "qwen3_5_text"]


def by_name(folder: Path | str, **kwargs: Any) -> dict[str, tuple[float, ...]]:
    model = load_model(str(folder), "auto", **kwargs)
    return {p.name: (p.inputs, p.outputs, p.nbytes) for p in model.shape.products}


def test_headers_and_model_class_agree(llama: Path) -> None:
    stored = by_name(llama, random_weights=False)
    assert stored == by_name(llama, random_weights=True)
    # hidden size 32, four query heads of 8, two of keys and values; float32
    key = stored["model.layers.0.self_attn.k_proj.weight"]
    assert list(key) == [32, 16, 4 * 32 * 16]
    assert list(stored["lm_head.weight"]) == [32, 128, 4 * 32 * 128]
    assert len(stored) == 4 * 7 + 1  # no norms, no embedding


def test_a_tied_embedding_is_read_as_the_head(tied_llama: Path) -> None:
    model = load_model(str(tied_llama), "auto", random_weights=False)
    (head,) = [p for p in model.shape.products if p.last_only]
    assert head.name == "model.embed_tokens.weight"


def test_another_dtype_changes_bytes_not_shapes(llama: Path) -> None:
    full, half = (
        load_model(str(llama), dtype, random_weights=False).shape
        for dtype in ("float32", "bfloat16")
    )
    assert half.weight_bytes == full.weight_bytes / 2
    assert half.cache_bytes(10) == full.cache_bytes(10) / 2


def save_linearized_config(llama: Path, folder: Path, layers: list[int]) -> Path:
    architecture = ARCHITECTURES["llama"]
    config = config_class(architecture).from_pretrained(llama)
    config.nbl_config = nbl_config_block(
        {index: LinearizedLayer(input="residual") for index in layers}
    )
    config.architectures = [architecture.nbl_causal_lm]
    config.save_pretrained(folder)
    return folder


def test_linearized_layers_have_a_map_and_no_cache(llama: Path, tmp_path: Path) -> None:
    base = load_model(str(llama), "auto", random_weights=True)
    folder = save_linearized_config(llama, tmp_path / "nbl", [1, 3])
    model = load_model(str(folder), "auto", random_weights=True)
    assert model.linearized == (1, 3)
    assert model.shape.cache_bytes(7) == base.shape.cache_bytes(7) / 2
    names = [p.name for p in model.shape.products if "layers.1.self_attn" in p.name]
    assert names == ["model.layers.1.self_attn.linear.weight"]


def test_quantized_weights_count_as_stored_with_their_scales(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    save_file(
        {
            f"{module}.weight_packed": torch.zeros(6, 4, dtype=torch.int32),
            f"{module}.weight_scale": torch.zeros(6, 1, dtype=torch.bfloat16),
            f"{module}.weight_shape": torch.tensor([6, 32]),
            "model.layers.0.mlp.gate_proj.weight": torch.zeros(6, 32, dtype=torch.int8),
            "model.layers.0.mlp.gate_proj.weight_scale": torch.zeros(6, 1),
            "lm_head.weight": torch.zeros(10, 32, dtype=torch.float32),
        },
        tmp_path / "model.safetensors",
    )
    found = {
        p.name.split(".")[-2]: (p.inputs, p.outputs, p.nbytes)
        for p in products(stored_tensors(tmp_path), activation_bytes=2)
    }
    assert found == {
        "up_proj": (32, 6, 6 * 4 * 4 + 6 * 2),
        "gate_proj": (32, 6, 6 * 32 + 6 * 4),
        "lm_head": (32, 10, 10 * 32 * 2),  # loaded in the dtype of the run
    }


def test_quantized_weights_are_counted_without_files_too(
    llama: Path, tmp_path: Path
) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    quantizer = QuantizationModifier(config_groups=FOUR_BITS, ignore=["lm_head"])
    compress(load(llama), quantizer, None, output_dir=str(tmp_path))
    stored, made_up = (
        {
            name.removesuffix("_packed"): values
            for name, values in by_name(tmp_path, random_weights=each).items()
        }
        for each in (False, True)
    )
    assert stored == made_up
    # four bits, and a float32 scale for 32 of them; the head as it was
    assert made_up["model.layers.0.self_attn.k_proj.weight"][2] == 32 * 16 // 2 + 16 * 4
    assert made_up["lm_head.weight"][2] == 4 * 32 * 128


@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_a_layer_are_one_product(fused: bool) -> None:
    prefix = "model.layers.0.mlp.experts"
    tensors = (
        {f"{prefix}.up_proj": StoredTensor((4, 6, 32), 4 * 6 * 32 * 2)}
        if fused
        else {
            f"{prefix}.{i}.up_proj.weight": StoredTensor((6, 32), 6 * 32 * 2)
            for i in range(4)
        }
    )
    (product, _head) = products(
        tensors | {"lm_head.weight": StoredTensor((10, 32), 640)},
        activation_bytes=2,
        experts_per_token=2,
    )[::-1]
    assert (product.experts, product.active) == (4, 2)
    assert product.nbytes == 4 * 6 * 32 * 2


def test_a_checkpoint_without_safetensors_is_refused(
    llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no \*\.safetensors files"):
        load_model(str(tmp_path), "auto", random_weights=False)


def test_an_unknown_dtype_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="runs in float8, known are float32"):
        load_model(str(llama), "float8", random_weights=False)


@pytest.mark.parametrize("model_type", [*sorted(THOROUGH), *HYBRIDS])
def test_every_family_has_a_shape(model_type: str, tiny_models: TinyModels) -> None:
    """Each decoder layer has products and, unless it is recurrent, attention."""
    folder = tiny_models(model_type)
    model = load_model(str(folder), "auto", random_weights=False)
    with_cache = with_attention(model_type, model.num_layers)
    assert len(model.shape.attentions) == len(with_cache)
    assert model.shape.cache_bytes(8) > 0
    for index in range(model.num_layers):
        assert any(f"layers.{index}." in p.name for p in model.shape.products)
    assert sum(p.last_only for p in model.shape.products) == 1
    assert not any("vision" in p.name for p in model.shape.products)
    meta = load_model(str(folder), "auto", random_weights=True)
    assert meta.shape.weight_bytes == model.shape.weight_bytes


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        (torch.float64, 8),
        (torch.float32, 4),
        (torch.bfloat16, 2),
        (torch.float8_e4m3fn, 1),
        (torch.int64, 8),
        (torch.uint8, 1),
        (torch.bool, 1),
    ],
)
def test_bytes_are_those_of_the_dtype(
    tmp_path: Path, dtype: torch.dtype, nbytes: int
) -> None:
    tensor = torch.zeros(3, 5).to(dtype)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    assert stored_tensors(tmp_path) == {"x": StoredTensor((3, 5), 15 * nbytes)}
    assert tensor.nbytes == 15 * nbytes
