# SPDX-License-Identifier: Apache-2.0
"""The methods that benchmarks/ compare, and how a model is compressed by each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, PreTrainedModel

from nbl_modifier.hf.configuration_nbl import NBLConfigMixin

if TYPE_CHECKING:
    from datasets import Dataset

    from nbl_modifier import NBLModifier

BASE, SLICED, PAPER, BEST = "base", "SliceGPT", "NBL (paper)", "NBL (best)"
DROP, BLOCK_DROP, SLEB, BLOCK_NBL = "DROP", "block DROP", "SLEB", "block NBL"
# NBLModifier's fields besides num_layers.
RECIPES: dict[str, dict[str, Any]] = {
    DROP: {"method": "drop", "criterion": "cosine"},
    SLEB: {
        "kind": "block",
        "method": "drop",
        "criterion": "loss",
        "selection": "greedy",
    },
    BLOCK_DROP: {"kind": "block", "method": "drop", "criterion": "cosine"},
    BLOCK_NBL: {"kind": "block"},
    "W_oW_v": {"method": "wo_wv", "input": "normalized"},
    PAPER: {},
    "NBL (best, closed form)": {"preset": "best", "distill": {"epochs": 0}},
    BEST: {"preset": "best"},
    # As many weights as full rank, in two layers.
    "NBL (best, half rank)": {"preset": "best", "rank": 0.5},
}
# What the greedy methods do with layers that they have chosen before.
CHOSEN: dict[str, dict[str, Any]] = {
    BEST: {"input": "normalized", "distill": {"epochs": 4}},
    SLEB: {"kind": "block", "method": "drop"},
}


def load(model: str | Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """
    Return a model.

    :param model: directory or Hugging Face name
    :param dtype: of its weights; by default the one it was saved in
    """
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def compress(
    model: PreTrainedModel,
    tokenizer: Any,
    calibration: Dataset,
    modifier: NBLModifier,
    directory: Path,
    statistics: Path,
    *,
    batch_size: int,
    seed: int,
) -> None:
    """
    Run one modifier through oneshot and save the checkpoint.

    :param model: the base model, changed in place
    :param tokenizer: the model's
    :param calibration: rows of token ids, all of them used, in their order
    :param modifier: one of a recipe of ``RECIPES``
    :param directory: for the checkpoint
    :param statistics: folder where those of calibration are kept, taken once for all
        methods that measure the same
    :param batch_size: rows per forward pass
    :param seed: of what is random
    """
    measured = f"statistics-{modifier.kind}-{modifier.input}"
    modifier.statistics = str(statistics / measured)
    torch.manual_seed(seed)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=calibration,
        recipe=modifier,
        output_dir=str(directory),
        num_calibration_samples=len(calibration),
        shuffle_calibration_samples=False,
        batch_size=batch_size,
    )


def layers_with_cache(config: Any) -> int:
    """
    Return how many decoder layers of a model have a KV cache.

    :param config: the model's
    """
    replaced = 0
    if isinstance(config, NBLConfigMixin):
        replaced = len(config.linearized_layers())
    return int(config.num_hidden_layers) - replaced


def slug(method: str) -> str:
    """
    Return a method's name as part of a file's.

    :param method: its name in tables
    """
    return "-".join("".join(c if c.isalnum() else " " for c in method).split())


def with_error(value: float, error: float | None) -> str:
    """
    Return a score and its standard error, where there is one.

    :param value: the score
    :param error: its standard error
    """
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
