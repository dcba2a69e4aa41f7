"""What a model and its calibration data are recognized by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["data_digest", "model_digest"]

_DIGITS = 16
# Elements of each weight that are looked at. Training changes them all.
_SAMPLES = 32
# Of a configuration: where it came from and how it runs, not what the model is.
_INCIDENTAL = ("_name_or_path", "transformers_version", "_attn_implementation", "dtype")


def model_digest(model: PreTrainedModel) -> str:
    """
    Return a digest of the configuration and of the weights.

    Of each weight: name, dtype, shape, and 32 elements spread evenly over it. Weights
    that are kept on disk are read once for it.

    :param model: as loaded, wherever its weights are
    :return: 16 hexadecimal digits
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _INCIDENTAL
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes(_sample(weight)))
    return digest.hexdigest()[:_DIGITS]


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """
    Return a digest of the tokens of all batches, in order, and of their masks.

    :param batches: with ``input_ids`` ``[batch, tokens]``, and ``attention_mask`` and
        ``loss_mask`` of the same shape where there are any
    :return: 16 hexadecimal digits
    """
    digest = hashlib.sha256()
    for batch in batches:
        for name in ("input_ids", "attention_mask", "loss_mask"):
            tokens = batch.get(name)
            if tokens is not None:
                digest.update(f"{name} {tuple(tokens.shape)}".encode())
                digest.update(_bytes(tokens.long()))
    return digest.hexdigest()[:_DIGITS]


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    places = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLES, flat.numel()))
    return flat[places.long().to(flat.device)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
