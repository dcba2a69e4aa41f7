# SPDX-License-Identifier: Apache-2.0
"""What the formats of benchmarks/kv_quantization.py make of keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.kv_formats import (
    Format,
    Quantizer,
    as_is,
    fp8,
    int8_per_token_head,
    quantize_cache,
    uniform,
)
from tests.tiny_llama import load, logits_of
from tests.tiny_models import save_tiny


@pytest.mark.parametrize(
    ("quantizer", "step"),
    [
        # e4m3 has 3 bits behind the leading one; half a step, of the number itself
        (fp8, lambda x: x.abs() * 2**-3 + 2**-9),
        (int8_per_token_head, lambda x: x.abs().amax(-1, keepdim=True) / 127),
        # float16 keeps 11 bits of the scale, which is taken 15 times, and of the least
        (
            lambda x: uniform(x, 4),
            lambda x: (x.amax(-1) - x.amin(-1))[..., None] * (1 / 15 + 2**-9),
        ),
    ],
)
def test_numbers_are_stored_to_half_a_step(
    quantizer: Quantizer, step: Quantizer
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 64, generator=generator)
    error = (quantizer(x) - x).abs()
    assert (error <= step(x) / 2).all()
    assert error.max() > 0
    if quantizer is not fp8:  # nothing larger than what was stored
        assert quantizer(x).abs().max() <= x.abs().max() * (1 + 2**-9)


def test_layers_at_the_ends_are_protected(tmp_path: Path) -> None:
    """A cache that forgets all changes layers 1 and 2 of 4, or none at all."""
    nothing = torch.zeros_like
    model = load(save_tiny(tmp_path / "base", "llama", num_layers=4))
    seen: dict[int, float] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.update(
                {index: float(inputs[0].detach().abs().max())}
            )
        )
    expected = logits_of(model)
    quantize_cache(model, Format(as_is, as_is))
    torch.testing.assert_close(logits_of(model), expected, rtol=0.0, atol=1e-5)
    quantize_cache(model, Format(nothing, nothing, protects=1))
    logits_of(model)
    assert [index for index, largest in seen.items() if largest == 0.0] == [1, 2]
