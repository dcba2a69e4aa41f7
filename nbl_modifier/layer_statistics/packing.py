"""Moments and windows as named tensors and strings, which is how they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nbl_modifier.numerics import CovarianceStats, PackedSymmetric

from .moments import LayerMoments

__all__ = ["pack_moments", "pack_windows", "unpack_moments", "unpack_windows"]

_SYMMETRIC = frozenset({"cov_xx", "cov_yy"})  # of which one triangle is stored


def pack_moments(
    part: str, moments: LayerMoments
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    Return moments as tensors and strings, all names beginning with ``part``.

    :param part: of the tokens they are of
    :param moments: of one layer
    """
    tensors: dict[str, Tensor] = {}
    metadata = {
        f"{part}.num_tokens": str(moments.num_tokens),
        f"{part}.cosine_distance": repr(moments.cosine_distance),
    }
    sources = {"residual": moments.residual, "normalized": moments.normalized}
    for source, stats in sources.items():
        if stats is None:
            continue
        for field in dataclasses.fields(stats):
            value = getattr(stats, field.name)
            if not isinstance(value, Tensor):
                continue
            if field.name in _SYMMETRIC:
                value = PackedSymmetric.pack(value).values
            tensors[f"{part}.{source}.{field.name}"] = value.cpu().contiguous()
    return tensors, metadata


def unpack_moments(
    part: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> LayerMoments | None:
    """
    Return what :func:`pack_moments` was given, or None if nothing has such names.

    :param part: its name there, such as ``fit``
    :param tensors: of all parts, by name
    :param metadata: of all parts, by name
    :raises KeyError: if something is missing
    :raises TypeError: if a tensor is missing of those that moments are made of
    :raises ValueError: if something is missing, or cannot be what it is said to be
    :raises RuntimeError: if tensors of one matrix do not fit each other
    """
    if f"{part}.num_tokens" not in metadata:
        return None

    def stats(source: str) -> CovarianceStats | None:
        prefix = f"{part}.{source}."
        fields: dict[str, Any] = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if not fields:
            return None
        for name in _SYMMETRIC & fields.keys():
            fields[name] = PackedSymmetric(fields[name]).dense()
        fields.setdefault("cov_yy", None)
        return CovarianceStats(num_tokens=int(metadata[f"{part}.num_tokens"]), **fields)

    residual = stats("residual")
    if residual is None:
        raise ValueError(f"no {part}.residual")
    return LayerMoments(
        residual, stats("normalized"), float(metadata[f"{part}.cosine_distance"])
    )


def pack_windows(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """
    Return batches as named tensors, on the CPU.

    :param batches: what the model is called with; what is no tensor is left out
    """
    return {
        f"{number}.{name}": value.cpu().contiguous()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def unpack_windows(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """
    Return what :func:`pack_windows` was given.

    :param tensors: by name
    :raises ValueError: if these are no batches
    """
    batches: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        batches.setdefault(number, {})[name] = tensor
    numbers = [str(number) for number in range(len(batches))]
    ids = [batch.get("input_ids") for batch in batches.values()]
    if batches.keys() != set(numbers) or any(i is None or i.dim() != 2 for i in ids):
        raise ValueError(f"it holds {sorted(tensors)}")
    return [batches[number] for number in numbers]
