# SPDX-License-Identifier: Apache-2.0
"""What users put after NBL in a recipe, and small models that all of it runs on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from tests.tiny_models import save_tiny

Kind = Literal["residual", "normalized"]
FAMILIES = ("llama", "qwen3", "mistral")
# Of 4 layers: the first, the last, neighbours, all but one.
LAYER_SETS = ([0], [3], [1, 2], [0, 1, 3])
# FP8_BLOCK and the presets of 4 bits want multiples of 128.
HIDDEN_SIZE = 128

_FP8_KV_CACHE = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}


def quantizer(kind: type[Any], scheme: str, **fields: Any) -> Modifier:
    """Return a quantizer of every Linear but the head."""
    return kind(scheme=scheme, targets=["Linear"], ignore=["lm_head"], **fields)


def _pruner(kind: type[Any]) -> Modifier:
    return kind(
        sparsity=0.5,
        mask_structure="2:4",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )


@dataclass(frozen=True)
class Follower:
    """
    The end of a recipe.

    :param make: returns its modifiers, new ones each time
    :param dtype: of the model that it runs on
    :param prunes: whether it prunes to 2:4, instead of quantizing
    :param smooths: whether it moves scales between a norm and its readers
    """

    make: Callable[[], list[Modifier]]
    dtype: torch.dtype = torch.float32
    prunes: bool = False
    smooths: bool = False


def _smoothquant() -> Modifier:
    return SmoothQuantModifier(smoothing_strength=0.8)


FOLLOWERS = {
    "gptq": Follower(lambda: [quantizer(GPTQModifier, "W4A16")]),
    "w4a16": Follower(lambda: [quantizer(QuantizationModifier, "W4A16")]),
    "w8a8": Follower(lambda: [quantizer(QuantizationModifier, "W8A8")]),
    "fp8_dynamic": Follower(lambda: [quantizer(QuantizationModifier, "FP8_DYNAMIC")]),
    "fp8": Follower(lambda: [quantizer(QuantizationModifier, "FP8")]),
    "fp8_block": Follower(lambda: [quantizer(QuantizationModifier, "FP8_BLOCK")]),
    # These two formats decompress to bfloat16 whatever the model was.
    "nvfp4a16": Follower(
        lambda: [quantizer(QuantizationModifier, "NVFP4A16")], torch.bfloat16
    ),
    "mxfp4": Follower(
        lambda: [quantizer(QuantizationModifier, "MXFP4")], torch.bfloat16
    ),
    "fp8_kv_cache": Follower(
        lambda: [
            quantizer(
                QuantizationModifier,
                "FP8_DYNAMIC",
                kv_cache_scheme=copy.deepcopy(_FP8_KV_CACHE),
            )
        ]
    ),
    "awq": Follower(
        lambda: [
            AWQModifier(n_grid=4),
            quantizer(QuantizationModifier, "W4A16_ASYM"),
        ],
        smooths=True,
    ),
    "smoothquant_w8a8": Follower(
        lambda: [_smoothquant(), quantizer(QuantizationModifier, "W8A8")],
        smooths=True,
    ),
    "smoothquant_gptq": Follower(
        lambda: [_smoothquant(), quantizer(GPTQModifier, "W8A8")]
    ),
    # AutoRound computes in bfloat16 on CPUs, whatever the model is.
    "autoround": Follower(
        lambda: [
            quantizer(AutoRoundModifier, "W4A16", iters=2, enable_torch_compile=False)
        ],
        torch.bfloat16,
    ),
    "sparsegpt": Follower(lambda: [_pruner(SparseGPTModifier)], prunes=True),
    "wanda": Follower(lambda: [_pruner(WandaPruningModifier)], prunes=True),
}


def quip() -> list[Modifier]:
    """Return QuIP's rotations and 4 bits."""
    return [
        QuIPModifier(rotations=["v", "u"], transform_type="random-hadamard"),
        quantizer(QuantizationModifier, "W4A16"),
    ]


class TinyModels:
    """
    Saved random models by family and dtype, each made once.

    :param folder: where to
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, family: str, dtype: torch.dtype = torch.float32) -> Path:
        """Return the directory of a model of 4 layers."""
        path = self._folder / f"{family}-{dtype}"
        if not path.exists():
            save_tiny(
                path,
                family,
                hidden_size=HIDDEN_SIZE,
                num_key_value_heads=4,
                dtype=dtype,
            )
        return path
