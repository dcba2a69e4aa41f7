"""What takes the place of a layer: from its statistics, or from its own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbl_modifier import numerics
from nbl_modifier.architectures import Architecture
from nbl_modifier.hf.configuration_nbl import LinearizedLayer

from .surgery import Replacement

__all__ = ["check_weights_map", "no_map", "realize", "weights_map"]


def realize(
    spec: LinearizedLayer,
    linear_map: numerics.LinearMap,
    stats: numerics.CovarianceStats,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> tuple[numerics.LinearMap, Replacement]:
    """
    Return the replacement that ``spec`` asks for, and the map that it computes.

    :param spec: what is replaced by what
    :param linear_map: of full rank, to what is added to the residual stream
    :param stats: moments of what the map reads, and of its target
    :param dtype: of the weights
    :param scale: what the layer multiplies the output of the replacement by
    :return: the map, of ``spec.rank``; and its weights on the CPU, rounded to ``dtype``
    """
    if spec.method == "drop":
        return linear_map, Replacement(spec)
    stored = linear_map.scaled(1.0 / scale)
    if spec.rank is None:
        weight, bias = stored.cast(dtype)
        return linear_map, Replacement(spec, weight.cpu(), bias.cpu())
    low = numerics.reduce_rank(stats, stored, spec.rank)
    expand, reduce, bias = low.cast(dtype)
    replacement = Replacement(spec, expand.cpu(), bias.cpu(), reduce.cpu())
    return low.dense.scaled(scale), replacement


def no_map(stats: numerics.CovarianceStats) -> numerics.LinearMap:
    """
    Return the map to zero, which is what a layer without attention has.

    :param stats: moments of what it would read, and of its target
    """
    return numerics.LinearMap(
        torch.zeros_like(stats.cov_yx),
        mean_x=torch.zeros_like(stats.mean_x),
        mean_y=torch.zeros_like(stats.mean_y),
        dampening_frac=0.0,
    )


def weights_map(attention: nn.Module) -> numerics.LinearMap:
    """
    Return ``W_o W_v``, the data-free estimator, of the output of the input norm.

    :param attention: a module that :func:`check_weights_map` accepts
    """
    module: Any = attention
    value, value_bias = _value_projection(module)
    return numerics.value_output_map(
        value,
        module.o_proj.weight,
        module.head_dim,
        value_bias,
        module.o_proj.bias,
    )


def _value_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(attention, "v_proj"):
        return attention.v_proj.weight, attention.v_proj.bias
    # Phi-3: queries, keys and values in one matrix, values last
    size = attention.config.num_key_value_heads * attention.head_dim
    bias = attention.qkv_proj.bias
    return attention.qkv_proj.weight[-size:], None if bias is None else bias[-size:]


def check_weights_map(
    name: str, attention: nn.Module, architecture: Architecture
) -> None:
    """
    Refuse families whose attention has no linear map ``W_o W_v`` inside.

    :param name: name of the attention module
    :param attention: the module
    :param architecture: its family
    :raises NotImplementedError: if a norm follows attention, or its projections have
        other names
    """
    projections = {child for child, _ in attention.named_children()}
    known = "o_proj" in projections and projections & {"v_proj", "qkv_proj"}
    if architecture.post_norm is None and known:
        return
    reason = (
        f"has a norm behind attention, {architecture.post_norm}"
        if architecture.post_norm is not None
        else f"has {', '.join(sorted(projections))}, not v_proj and o_proj"
    )
    raise NotImplementedError(
        f"{name}: method 'wo_wv' multiplies the value and output projections, but "
        f"{architecture.causal_lm} {reason}. Use method: linear."
    )
