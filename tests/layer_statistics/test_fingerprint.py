# SPDX-License-Identifier: Apache-2.0
"""What tells models, data and files apart, at the sizes that real ones have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbl_modifier.layer_statistics.fingerprint import (
    model_digest,
    sampled_model_digest,
    tensors_digest,
)
from tests.tiny_llama import Model, load


def model_of(**weights: Tensor) -> Any:
    """Return what a digest reads of a model that has these weights."""
    model = nn.Module()
    for name, weight in weights.items():
        model.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    model.config = SimpleNamespace(to_dict=lambda: {"vocab_size": 3})  # type: ignore[assignment]
    return model


# 28,311,552 is SmolLM2's embedding: in float32 its last place is one past its end.
@pytest.mark.parametrize("count", [1, 31, 33, 2**24 + 1, 28_311_552])
def test_statistics_of_version_2_look_inside_the_weight(count: int) -> None:
    sampled_model_digest(model_of(weight=torch.zeros(count, dtype=torch.int8)))


def test_statistics_of_version_2_look_where_they_did() -> None:
    """Their digests are on disks: places in float32, whatever they round to."""
    places = torch.linspace(0, 2**24 + 2, 32).long()  # what commit 0f3852f took
    assert places[-1] == 2**24 + 2
    weight = torch.zeros(2**24 + 3, dtype=torch.int8)
    before = sampled_model_digest(model_of(weight=weight))
    for place in places.tolist():
        weight[place] = 1
        assert sampled_model_digest(model_of(weight=weight)) != before
        weight[place] = 0
    others = torch.ones_like(weight)
    others[places] = 0
    assert sampled_model_digest(model_of(weight=others)) == before


@pytest.mark.parametrize("shape", [(2**31 + 8,), (262_144, 8_200)], ids=str)
def test_weights_of_more_than_2_to_the_31_values(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is hashed, part by part; nothing of its size is made."""
    weight = torch.zeros((), dtype=torch.int8).expand(shape)
    sizes: list[int] = []
    monkeypatch.setattr(
        "nbl_modifier.layer_statistics.fingerprint.hashlib.blake2b",
        lambda *_, **__: Counting(sizes),
    )
    model_digest(model_of(weight=weight))
    assert sum(sizes) == weight.numel() > 2**31
    assert max(sizes) <= 2**26


class Counting:
    """Stands for the hash, whose speed is not what is tested."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def update(self, part: Any) -> None:
        if not isinstance(part, bytes):
            self._sizes.append(len(memoryview(part).cast("B")))

    def hexdigest(self) -> str:
        return ""


def test_ten_rows_of_an_embedding_make_another_model() -> None:
    """So few are missed by 32 samples, which is what version 2 took."""
    weight = torch.zeros(49_152, 8)
    model = model_of(weight=weight)
    sampled, whole = sampled_model_digest(model), model_digest(model)
    weight[100:110] = 1.0
    assert sampled_model_digest(model) == sampled
    assert model_digest(model) != whole


@pytest.mark.parametrize("edit", ["last", "buffer", "config", "dtype"])
def test_any_edit_makes_another_model(llama: Path, edit: str) -> None:
    model: Model = load(llama)
    before = model_digest(model)
    model.register_buffer("cached", torch.zeros(2), persistent=False)
    assert model_digest(model) == before  # not part of a checkpoint
    with torch.no_grad():
        if edit == "last":
            model.model.layers[3].mlp.down_proj.weight[-1, -1] += 1e-3
        elif edit == "buffer":
            model.register_buffer("scale", torch.zeros(2))
        elif edit == "config":
            model.config.rms_norm_eps *= 2
        else:
            model.double()
    assert model_digest(model) != before


def test_where_a_model_lies_is_no_matter(llama: Path) -> None:
    model, same = load(llama), load(llama)
    same.config._name_or_path = "elsewhere"
    assert model_digest(model) == model_digest(same)


def test_tensors_are_told_apart() -> None:
    zeros = torch.zeros(2, 3)
    tensors = {"a": zeros, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    digest = tensors_digest(tensors, {"name": "x"})
    assert tensors_digest(dict(reversed(tensors.items())), {"name": "x"}) == digest
    for others, said in (
        (tensors, {"name": "y"}),
        (tensors, None),
        ({"a": zeros}, {"name": "x"}),
        ({**tensors, "a": zeros.reshape(3, 2)}, {"name": "x"}),
        ({**tensors, "a": zeros.int()}, {"name": "x"}),
        ({**tensors, "a": -zeros}, {"name": "x"}),
        ({"a": tensors["b"], "b": zeros}, {"name": "x"}),
    ):
        assert tensors_digest(others, said) != digest
