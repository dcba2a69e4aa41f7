"""What stands in vLLM's models in place of attention, a whole block or a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig

from nbl_modifier.hf.configuration_nbl import LinearizedLayer

__all__ = [
    "DroppedAttention",
    "LinearizedAttention",
    "LinearizedBlock",
    "LowRankLinear",
    "ResidualAdd",
    "make_map",
]

# Output features per process that vLLM's kernels for 4-bit weights can work on: a
# multiple of 64 on GPUs (Marlin), of 32 on CPUs.
_MIN_SPLIT = 64


class LowRankLinear(nn.Module):
    """
    Affine map of low rank, as two linear layers.

    In tensor parallel both are split over their output features, so that groups of a
    quantized input dimension stay whole in each of them, whatever the rank. Where too
    little of the rank would be left to each process, all hold all of the first layer.

    :param hidden_size: width of the residual stream
    :param rank: features between the two layers
    :param quant_config: the checkpoint's quantization, or None
    :param prefix: name of this module
    :param return_bias: whether to return None besides, as vLLM's linear layers do
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        return_bias: bool = True,
    ) -> None:
        super().__init__()
        self.return_bias = return_bias
        options = {"quant_config": quant_config, "prefix": f"{prefix}.reduce"}
        if rank % (_MIN_SPLIT * get_tensor_model_parallel_world_size()) == 0:
            self.reduce = ColumnParallelLinear(
                hidden_size, rank, bias=False, gather_output=True, **options
            )
        else:
            self.reduce = ReplicatedLinear(hidden_size, rank, bias=False, **options)
        self.expand = ColumnParallelLinear(
            rank,
            hidden_size,
            bias=True,
            gather_output=True,
            quant_config=quant_config,
            prefix=f"{prefix}.expand",
        )

    def forward(
        self, hidden_states: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """
        Return the map of every token.

        :param hidden_states: ``[num_tokens, hidden_size]``
        :return: ``[num_tokens, hidden_size]``, and None if ``return_bias``
        """
        reduced, _bias = self.reduce(hidden_states)
        output, _bias = self.expand(reduced)
        return (output, None) if self.return_bias else output


def make_map(
    hidden_size: int,
    spec: LinearizedLayer,
    quant_config: QuantizationConfig | None,
    prefix: str,
    return_bias: bool = True,
) -> nn.Module:
    """
    Return the linear map of a layer, split over its output features in tensor parallel.

    Each process holds 1/TP of the weight, and groups of a quantized input dimension
    stay whole.

    :param hidden_size: width of the residual stream
    :param spec: says whether the map is of low rank
    :param quant_config: the checkpoint's quantization, or None
    :param prefix: name of the map in the model
    :param return_bias: whether to return None besides, as vLLM's linear layers do
    """
    if spec.rank is not None:
        return LowRankLinear(hidden_size, spec.rank, quant_config, prefix, return_bias)
    # Exactly this class: LoRA does not recognize subclasses of it.
    return ColumnParallelLinear(
        hidden_size,
        hidden_size,
        bias=True,
        gather_output=True,
        quant_config=quant_config,
        prefix=prefix,
        return_bias=return_bias,
    )


def _streams(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Return hidden states and residual stream that a module of vLLM was called with.

    By name, or else in this order; positions, which may stand in front or behind, are
    integers.
    """
    given = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    named = [kwargs.get(name) for name in ("hidden_states", "residual")]
    hidden_states = given.pop(0) if named[0] is None else named[0]
    residual = given.pop(0) if given and named[1] is None else named[1]
    return hidden_states, residual


class LinearizedAttention(nn.Module):
    """
    Affine map in place of an attention layer, without a KV cache.

    :param linear: the map
    :param num_summands: how many processes' outputs the decoder layer adds up: in a
        parallel block attention and MLP leave that to the layer, which does it once
    """

    def __init__(self, linear: nn.Module, num_summands: int = 1) -> None:
        super().__init__()
        self.linear = linear
        self.num_summands = num_summands

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Return the map of every token, or this process's equal share of it.

        :param args: as vLLM's attention modules are called, in the family's order;
            among them the hidden states ``[num_tokens, hidden_size]``
        :param kwargs: the same by name
        :return: ``[num_tokens, hidden_size]``
        """
        hidden_states, _ = _streams(args, kwargs)
        output, _bias = self.linear(hidden_states)
        return output if self.num_summands == 1 else output / self.num_summands


class DroppedAttention(nn.Module):
    """Nothing in place of an attention layer: it adds zero to the residual stream."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Return zero for every token.

        :param args: as :meth:`LinearizedAttention.forward`
        :param kwargs: the same by name
        :return: ``[num_tokens, hidden_size]``
        """
        hidden_states, _ = _streams(args, kwargs)
        return torch.zeros_like(hidden_states)


class LinearizedBlock(nn.Module):
    """
    Affine map in place of a whole transformer block: what it adds to the stream.

    vLLM's blocks hand on the residual stream in one of three ways, see
    :attr:`Architecture.vllm_stream`.

    :param linear: the map
    :param stream: how the family's blocks hand on the residual stream
    """

    def __init__(self, linear: nn.Module, stream: str) -> None:
        super().__init__()
        self.linear = linear
        self.stream = stream

    def forward(
        self, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the residual stream after the block, as the family's blocks do.

        :param args: as vLLM's blocks are called, in the family's order: among them the
            hidden states ``[num_tokens, hidden_size]``, then the residual stream, same
            shape, or None in front of the first block
        :param kwargs: the same by name
        :return: ``sum``: what is added to the stream, and the stream before it;
            ``first``: the stream after it, and before; ``only``: the stream after it;
            ``lone``: the same, and None
        """
        hidden_states, residual = _streams(args, kwargs)
        if self.stream == "sum" and residual is not None:
            hidden_states = (hidden_states + residual).to(hidden_states.dtype)
        added, _bias = self.linear(hidden_states)
        if self.stream == "sum":
            return added, hidden_states
        after = hidden_states + added
        if self.stream == "lone":
            return after, None
        return (after, hidden_states) if self.stream == "first" else after


class ResidualAdd(nn.Module):
    """
    What vLLM's fused add-and-norm does, minus the norm.

    Stands where a norm was folded into the linear map.
    """

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Return the input of attention, and the residual stream if it was given.

        :param hidden_states: output of the previous layer's MLP
            ``[num_tokens, hidden_size]``, or the residual stream itself in layer 0
        :param residual: the residual stream before it, same shape and dtype
        :return: their sum, twice, since the input of attention is the residual stream;
            without ``residual`` just ``hidden_states``. Rounded as ``RMSNorm`` does:
            to the dtype of ``hidden_states``, after the addition.
        """
        if residual is None:
            return hidden_states
        total = (hidden_states + residual).to(hidden_states.dtype)
        return total, total
