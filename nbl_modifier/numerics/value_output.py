# SPDX-License-Identifier: Apache-2.0
"""The linear map that attention's own weights contain: no data needed."""

import torch
from torch import Tensor

from .lmmse import LinearMap


def value_output_map(
    value: Tensor,
    output: Tensor,
    head_dim: int,
    value_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
) -> LinearMap:
    """
    Return ``W = W_o W_v``, attention that looks at the current token only.

    The initialisation of linear attention substitutes in Puzzle, arXiv:2411.19146. With
    grouped queries each value head is read by several query heads, so its rows are
    repeated for each of them.

    :param value: W_v, ``[num_value_heads * head_dim, d]``, floating point
    :param output: W_o, ``[d, num_heads * head_dim]``
    :param head_dim: width of one head
    :param value_bias: ``[num_value_heads * head_dim]`` or None
    :param output_bias: ``[d]`` or None
    :return: weight ``[d, d]`` and its bias ``W_o b_v + b_o``, float64
    :raises ValueError: if the shapes do not fit each other
    """
    num_heads, rest = divmod(output.shape[1], head_dim)
    num_value_heads, value_rest = divmod(value.shape[0], head_dim)
    if rest or value_rest or num_value_heads < 1 or num_heads % num_value_heads:
        raise ValueError(
            f"value and output projection: heads of {head_dim} do not fit value "
            f"{tuple(value.shape)} and output {tuple(output.shape)}."
        )
    group = num_heads // num_value_heads
    by_group = output.double().unflatten(1, (num_value_heads, group, head_dim))
    # All heads of a group multiply the same values: sum first, then one product.
    shared = by_group.sum(2).flatten(1)
    bias = torch.zeros(output.shape[0], dtype=torch.float64, device=output.device)
    if value_bias is not None:
        bias += shared @ value_bias.double()
    if output_bias is not None:
        bias += output_bias.double()
    weight = shared @ value.double()
    mean_x = torch.zeros(value.shape[1], dtype=torch.float64, device=value.device)
    return LinearMap(weight, mean_x=mean_x, mean_y=bias, dampening_frac=0.0)
