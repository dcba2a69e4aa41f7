# SPDX-License-Identifier: Apache-2.0
"""W = W_o W_v, against attention over a single token, which is just that."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nbl_modifier.numerics import value_output_map

D, HEAD_DIM, NUM_HEADS = 24, 6, 4


def weights(num_value_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (num_value_heads * HEAD_DIM, D),
        (D, NUM_HEADS * HEAD_DIM),
        (num_value_heads * HEAD_DIM,),
        (D,),
    )
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("num_value_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_is_attention_to_oneself(num_value_heads: int, biased: bool) -> None:
    value, output, value_bias, output_bias = weights(num_value_heads)
    if not biased:
        value_bias, output_bias = torch.zeros_like(value_bias), torch.zeros(D)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    values = (x @ value.T + value_bias).view(5, num_value_heads, 1, HEAD_DIM)
    queries = torch.ones(5, NUM_HEADS, 1, HEAD_DIM)  # one token: they do not matter
    keys = torch.ones(5, num_value_heads, 1, HEAD_DIM)
    heads = scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
    expected = heads.flatten(1) @ output.T + output_bias
    linear_map = value_output_map(
        value,
        output,
        HEAD_DIM,
        value_bias if biased else None,
        output_bias if biased else None,
    )
    weight, bias = linear_map.cast(torch.float32)
    # float32 sums of 24 products, twice
    torch.testing.assert_close(x @ weight.T + bias, expected, rtol=0, atol=2e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    value, output, *_ = weights(2)
    with pytest.raises(ValueError, match="heads of 7 do not fit"):
        value_output_map(value, output, 7)
    with pytest.raises(ValueError, match=r"value \(18, 24\)"):
        value_output_map(torch.randn(18, D), output, HEAD_DIM)
