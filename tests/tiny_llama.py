# SPDX-License-Identifier: Apache-2.0
"""
Random models of a few thousand weights, and real llm-compressor runs on them.

llm-compressor is imported inside the functions that need it: seconds, which tests that
do not compress should not wait for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.tiny_models import VOCAB_SIZE, save_tiny

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "models" / "pycode-4m"
# A PreTrainedModel; to a type checker each of its attributes may also be a tensor.
Model = Any
# 4 bits like W4A16, in groups that fit hidden sizes of 32 and more.
FOUR_BITS: dict[str, Any] = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
        },
    }
}


def save_llama(folder: Path, **kwargs: Any) -> Path:
    """Save a random Llama, see :func:`tests.tiny_models.save_tiny`."""
    return save_tiny(folder, "llama", **kwargs)


def load(folder: Path | str, **kwargs: Any) -> Model:
    """Return the language model saved in ``folder``, a vision-language model too."""
    import transformers

    from nbl_modifier.architectures import architecture_of

    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        auto_class = architecture_of(config.model_type).auto_class
    except NotImplementedError:
        auto_class = "AutoModelForCausalLM"
    loader = getattr(transformers, auto_class)
    return loader.from_pretrained(folder, dtype="auto", **kwargs)


def load_on_disk(folder: Path, offload_folder: Path) -> Model:
    """Load a random Llama as llm-compressor does one of which little fits in memory."""
    from compressed_tensors.offload import load_offloaded_model
    from transformers import AutoModelForCausalLM

    with load_offloaded_model():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": 60_000},  # bytes: the embedding
            offload_folder=str(offload_folder),
        )


def token_rows(num_rows: int = 16, length: int = 64, seed: int = 0) -> Dataset:
    """Return tokenized random text: ``num_rows`` sequences of ``length`` tokens."""
    return ragged_rows([length] * num_rows, seed)


def ragged_rows(lengths: list[int], seed: int = 0) -> Dataset:
    """Return tokenized random text, sequence i of ``lengths[i]`` tokens."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in lengths
    ]
    masks = [[1] * length for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": masks})


def demo_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerBase:
    """
    Return the demo model's tokenizer.

    oneshot() wants one with every dataset; for rows that are tokens already it is only
    asked how to pad.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL, padding_side=padding_side)


def compress(
    model: Model | str | Path,
    recipe: Any,
    rows: Dataset | None,
    **kwargs: Any,
) -> Model:
    """
    Run oneshot() and return its model.

    :param model: a model that was loaded from a directory, or the directory
    :param recipe: what oneshot takes
    :param rows: calibration data, all of which is used, in order
    :param kwargs: of oneshot
    """
    from llmcompressor import oneshot

    kwargs.setdefault("processor", demo_tokenizer())
    if rows is not None:
        kwargs.setdefault("num_calibration_samples", len(rows))
        kwargs.setdefault("shuffle_calibration_samples", False)
    return oneshot(
        model=str(model) if isinstance(model, Path) else model,
        recipe=recipe,
        dataset=rows,
        **kwargs,
    )


def logits_of(model: Model, seed: int = 7) -> Tensor:
    """Return ``model``'s logits on two fixed random sequences of 24 tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCAB_SIZE, (2, 24), generator=generator)
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def decoder_layers(model: Model) -> Any:
    """Return the decoder layers, those of a vision-language model's text decoder."""
    from nbl_modifier.architectures import architecture_of

    return model.get_submodule(architecture_of(model.config.model_type).layers)


def linearized(model: Model) -> list[int]:
    """Return the decoder layers in which attention is a linear map."""
    return [
        index
        for index, layer in enumerate(decoder_layers(model))
        if hasattr(getattr(layer, "self_attn", None), "linear")
    ]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, from all of its files."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not tensors.keys() & found.keys()  # no tensor is stored twice
        tensors |= found
    return tensors
