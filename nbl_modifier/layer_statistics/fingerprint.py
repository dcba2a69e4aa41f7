"""What a model, its calibration data and saved tensors are recognized by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["data_digest", "model_digest", "sampled_model_digest", "tensors_digest"]

_DIGITS = 16
# Bytes of a weight that are brought to the CPU, and hashed, at a time.
_PART_BYTES = 1 << 26
# Elements of each weight that statistics of format version 2 looked at.
_SAMPLES = 32
# Of a configuration: where it came from and how it runs, not what the model is.
_INCIDENTAL = ("_name_or_path", "transformers_version", "_attn_implementation", "dtype")


def model_digest(model: PreTrainedModel) -> str:
    """
    Return a digest of the configuration and of all weights.

    Of each weight: name, dtype, shape and every bit, since whoever edits a few rows of
    an embedding has another model. Weights that are kept on disk are read once for it.

    :param model: as loaded, wherever its weights are
    :return: 16 hexadecimal digits
    """
    digest = hashlib.blake2b(_config_text(model), digest_size=_DIGITS // 2)
    for name, weight in _by_name(chain(model.named_parameters(), _buffers(model))):
        _add(digest, name, weight.detach())
    return digest.hexdigest()


def sampled_model_digest(model: PreTrainedModel) -> str:
    """
    Return what statistics of format version 2 recognize their model by.

    Of each weight: name, dtype, shape, and 32 elements spread over it. An edit of a few
    rows is likely to go unseen.

    :param model: as loaded, wherever its weights are
    :return: 16 hexadecimal digits
    """
    digest = hashlib.sha256(_config_text(model))
    for name, weight in _by_name(model.named_parameters()):
        flat = weight.detach().flatten()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes(flat[_places(len(flat)).to(flat.device)]))
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


def tensors_digest(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """
    Return a digest of named tensors and what is said of them, in any order.

    :param tensors: any dtype, shape and device
    :param metadata: strings that go with them
    :return: 16 hexadecimal digits
    """
    said = json.dumps(dict(metadata or {}), sort_keys=True)
    digest = hashlib.blake2b(said.encode(), digest_size=_DIGITS // 2)
    for name, tensor in _by_name(tensors.items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _config_text(model: PreTrainedModel) -> bytes:
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _INCIDENTAL
    }
    return json.dumps(config, sort_keys=True, default=str).encode()


def _buffers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong to a checkpoint; others follow from its config."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _by_name(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return sorted(named, key=lambda item: item[0])


def _places(count: int) -> Tensor:
    """
    Return the elements of a weight that format version 2 looked at.

    In float32, as it had them, so above 2^24 elements they are rounded to places nearby
    and the last one may be past the end, where version 2 could not be written at all.
    """
    places = torch.linspace(0, max(0, count - 1), min(_SAMPLES, count))
    return places.long().clamp_max_(count - 1)


def _add(digest: hashlib.blake2b, name: str, tensor: Tensor) -> None:
    digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for part in _parts(tensor):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor in rows, of which none but a single one is a large part."""
    if tensor.dim() == 0:
        yield tensor[None]
    elif tensor.numel():
        row_bytes = tensor.element_size() * tensor.shape[1:].numel()
        yield from tensor.split(max(1, _PART_BYTES // row_bytes))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
