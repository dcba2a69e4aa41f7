# SPDX-License-Identifier: Apache-2.0
"""A small model whose layers are measured without llm-compressor's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration.layers import MeasuredLayers
from nbl_modifier.calibration.observer import BatchInFlight
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import decoder_layers
from tests.tiny_llama import Model, load


@dataclass
class Observed:
    """
    A model, run batch by batch.

    :param model: the causal language model
    :param layers: of it, all measured
    :param number: of the batch in flight
    """

    model: Model
    layers: MeasuredLayers
    number: int = -1

    def in_flight(self) -> BatchInFlight:
        return BatchInFlight(self.number, None, "sdpa")

    def run(self, batches: Iterable[list[list[int]]]) -> None:
        """Run token ids ``[batch][tokens]``, hooks included."""
        for number, tokens in enumerate(batches):
            self.number = number
            with torch.no_grad():
                self.model(torch.tensor(tokens), use_cache=False)


def register(module: nn.Module, hook: Any, kind: str, **options: Any) -> None:
    getattr(module, f"register_{kind}_hook")(hook, **options)


def unguarded(hook: Callable[..., None]) -> Callable[..., None]:
    return hook


def observed(
    folder: Path,
    reads: Literal["residual", "normalized"] = "residual",
    spec: LinearizedLayer | None = None,
) -> Observed:
    """Return a saved model, loaded, and what measures it."""
    model = load(folder)
    architecture = architecture_of(model.config.model_type)
    modules = dict(enumerate(decoder_layers(model, architecture)))
    names = {index: architecture.attention_name(index) for index in modules}
    spec = spec or LinearizedLayer(reads, "attention", "linear", None)
    return Observed(model, MeasuredLayers(modules, names, architecture, spec))
