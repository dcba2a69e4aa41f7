# SPDX-License-Identifier: Apache-2.0
"""What attention adds to the residual stream, and what a linear map can make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbl_modifier.architectures import Architecture
from nbl_modifier.records.compression import LayerResult
from tests.tiny_llama import decoder_layers


@contextmanager
def recorded(model: Any, row: Architecture, index: int) -> Iterator[list[Tensor]]:
    """
    Record the residual stream around the attention of one layer, float64.

    Independently of the table: what comes into the layer, and what the norm (or MLP)
    behind the addition reads.

    :return: filled with before and after ``[tokens, hidden_size]``, for each batch
    """
    layer = decoder_layers(model)[index]
    states: list[Tensor] = []

    def flat(values: Tensor) -> Tensor:
        return values.detach().flatten(0, -2).double()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(flat(args[0] if args else kwargs["hidden_states"]))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True)]
    if row.parallel:  # attention and MLP are added in one go

        def add(module: nn.Module, args: Any, output: Any) -> None:
            states.append(states[-1] + flat(output[0]))

        handles.append(layer.self_attn.register_forward_hook(add))
    else:
        reader = {
            "gemma2": "pre_feedforward_layernorm",
            "gemma3": "pre_feedforward_layernorm",
            "gemma3_text": "pre_feedforward_layernorm",
            "gemma4_text": "pre_feedforward_layernorm",
            "olmo2": "mlp",
            "olmo3": "mlp",
            "exaone4": "mlp",
        }.get(row.model_type, "post_attention_layernorm")
        handles.append(
            layer.get_submodule(reader).register_forward_pre_hook(
                before, with_kwargs=True
            )
        )
    yield states
    for handle in handles:
        handle.remove()


@torch.no_grad()
def stream(
    model: Any, row: Architecture, index: int, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Return the residual stream before and after the attention of one layer.

    :param tokens: ids ``[batch, tokens]``
    :return: both float64 ``[batch * tokens, hidden_size]``
    """
    with recorded(model, row, index) as states:
        model.eval()(tokens, use_cache=False)
    before, after = states
    return before, after


def assert_best_map(
    base: Any,
    model: Any,
    row: Architecture,
    kind: str,
    measured: LayerResult,
    tokens: Tensor,
) -> None:
    """
    Check the map of the first layer that was replaced against a least squares fit.

    In the units of the residual stream, behind a norm or a factor of the family. The
    report's error is the one measured on the model, and no affine map has less.

    :param base: the model before
    :param model: the model after
    :param row: their family
    :param kind: what the map reads, ``residual`` or ``normalized``
    :param measured: the report's figures of that layer
    :param tokens: the calibration set, ids ``[batch, tokens]``
    """
    index = measured.index
    before, after = stream(base, row, index, tokens)
    _, approximated = stream(model, row, index, tokens)
    read = before
    if kind == "normalized":
        assert row.input_norm is not None
        norm = decoder_layers(base)[index].get_submodule(row.input_norm)
        read = norm(before.float()).detach().double()
    design = torch.cat([read, torch.ones(len(read), 1)], dim=1)
    # rcond: of a LayerNorm's output one direction is rounding errors alone
    fit = torch.linalg.lstsq(design, after - before, rcond=1e-6, driver="gelsd")
    best = design @ fit.solution

    def variance(values: Tensor) -> Tensor:
        return (values - values.mean(0)).square().sum()

    error = (approximated - after).square().sum()
    least = (before + best - after).square().sum()
    # float32 activations, and a map rounded to float32
    torch.testing.assert_close(error, least, rtol=1e-4, atol=0.0)
    assert float(least / variance(after - before)) == pytest.approx(
        measured.nmse, rel=1e-4
    )
    assert float(least / variance(after)) == pytest.approx(
        measured.residual_nmse, rel=1e-4
    )
