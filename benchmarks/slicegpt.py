# SPDX-License-Identifier: Apache-2.0
"""
SliceGPT, a baseline for benchmarks/compare_methods.py: evaluation in memory only.

Written from the paper, arXiv:2401.15024. Where norms have no weights of their own, a
transformer computes the same in any orthonormal basis of its residual stream; in the
basis of the principal components of what its norms put out, the last components carry
little and are cut off, everywhere. Llama only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel


class SlicedNorm(nn.Module):
    """
    RMS norm without weights, of a stream of which components were cut off.

    :param width: components of the stream before it was cut, what the mean is over
    :param eps: as in the model's own norms
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` over its root mean square, ``[..., sliced]``."""
        variance = hidden.float().square().sum(-1, keepdim=True) / self.width
        return (hidden * torch.rsqrt(variance + self.eps)).to(hidden.dtype)


class SlicedLayer(nn.Module):
    """
    A Llama layer between two bases of the residual stream.

    :param layer: the stock layer, its norms' weights folded into what reads them
    :param norm: the norm of the sliced stream
    :param width: of the stream before it was cut
    """

    def __init__(self, layer: Any, norm: SlicedNorm, width: int) -> None:
        super().__init__()
        self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.norm = norm
        # From the basis in front of attention to that in front of the MLP, and on to
        # that in front of the next layer: the identity until they are known.
        self.around_attention = nn.Parameter(torch.eye(width))
        self.around_mlp = nn.Parameter(torch.eye(width))

    def after_attention(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the stream in front of the MLP."""
        output, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
        stream: Tensor = hidden_states @ self.around_attention + output
        return stream

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the stream in front of the next layer."""
        stream = self.after_attention(hidden_states, **kwargs)
        output: Tensor = stream @ self.around_mlp + self.mlp(self.norm(stream))
        return output


@torch.no_grad()
def slice_model(
    model: PreTrainedModel, batches: Iterable[Tensor], width: int
) -> LlamaForCausalLM:
    """
    Cut the residual stream of a model down to ``width`` components, in place.

    Layer by layer, each on what the layers sliced before it really put out.

    :param model: a Llama, on one device
    :param batches: calibration tokens, ``[batch, length]`` each
    :param width: components to keep
    :return: ``model``, in float32
    :raises NotImplementedError: if it is no Llama
    :raises ValueError: if ``width`` is more than the hidden size
    """
    if not isinstance(model, LlamaForCausalLM):
        raise NotImplementedError(
            f"SliceGPT is implemented for Llama only, got {type(model).__name__}."
        )
    full = model.config.hidden_size
    if not 0 < width <= full:
        raise ValueError(f"width: must be in [1, {full}], got {width}.")
    model.float().eval()
    _fold_norms(model)
    norm = SlicedNorm(full, model.config.rms_norm_eps)
    decoder: Any = model.model
    streams = [decoder.embed_tokens(tokens) for tokens in batches]
    calls = [_layer_arguments(decoder, stream) for stream in streams]
    basis = _principal(map(norm, streams), width)
    _set(decoder.embed_tokens, decoder.embed_tokens.weight @ basis)
    streams = [stream @ basis for stream in streams]
    for index in range(len(decoder.layers)):
        layer = SlicedLayer(decoder.layers[index], norm, full)
        decoder.layers[index] = layer
        for name in ("q_proj", "k_proj", "v_proj"):
            _read_in(getattr(layer.self_attn, name), basis)
        layer.around_attention.data = basis.mT
        basis = _principal(_each(layer.after_attention, streams, calls, norm), width)
        layer.around_attention.data = layer.around_attention @ basis
        _write_in(layer.self_attn.o_proj, basis)
        for name in ("gate_proj", "up_proj"):
            _read_in(getattr(layer.mlp, name), basis)
        layer.around_mlp.data = basis.mT
        basis = _principal(_each(layer.forward, streams, calls, norm), width)
        layer.around_mlp.data = layer.around_mlp @ basis
        _write_in(layer.mlp.down_proj, basis)
        streams = list(_each(layer.forward, streams, calls))
    decoder.norm = norm
    _read_in(model.lm_head, basis)
    return model


def widest_within(model: PreTrainedModel, num_parameters: int) -> int:
    """
    Return the largest width at which a sliced model has so many parameters at most.

    :param model: the model before it is sliced
    :param num_parameters: budget, the matrices around each layer included
    :raises ValueError: if even one component takes more
    """
    config: Any = model.config
    full, layers = config.hidden_size, config.num_hidden_layers
    # Each weight touches the stream with one side: their number goes with the width.
    norms = sum(w.numel() for name, w in model.named_parameters() if "norm" in name)
    per_component = (sum(p.numel() for p in model.parameters()) - norms) / full
    if config.tie_word_embeddings:  # embedding and head are in different bases now
        per_component += config.vocab_size
    for width in range(full, 0, -1):
        if width * per_component + 2 * layers * width**2 <= num_parameters:
            return width
    raise ValueError(f"SliceGPT: no width fits {num_parameters} parameters.")


def _fold_norms(model: LlamaForCausalLM) -> None:
    """Multiply the weights of all norms into the matrices that read them."""
    decoder: Any = model.model
    vocab_size, width = model.lm_head.weight.shape
    head = nn.Linear(width, vocab_size, bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.clone())  # tied no longer
    model.lm_head = head
    model.config.tie_word_embeddings = False
    pairs = [(decoder.norm, head)]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        before = (attention.q_proj, attention.k_proj, attention.v_proj)
        pairs += [(layer.input_layernorm, reader) for reader in before]
        pairs += [
            (layer.post_attention_layernorm, reader)
            for reader in (mlp.gate_proj, mlp.up_proj)
        ]
    for norm, reader in pairs:
        _set(reader, reader.weight * norm.weight)


def _layer_arguments(decoder: Any, stream: Tensor) -> dict[str, Any]:
    length = stream.shape[1]
    positions = torch.arange(length, device=stream.device)[None]
    minimum = torch.finfo(stream.dtype).min
    mask = torch.full((length, length), minimum, device=stream.device).triu(1)
    return {
        "position_embeddings": decoder.rotary_emb(stream, positions),
        "attention_mask": mask[None, None],
    }


def _each(
    function: Callable[..., Tensor],
    streams: list[Tensor],
    calls: list[dict[str, Any]],
    norm: SlicedNorm | None = None,
) -> Iterable[Tensor]:
    for stream, arguments in zip(streams, calls, strict=True):
        output = function(stream, **arguments)
        yield output if norm is None else norm(output)


def _principal(signals: Iterable[Tensor], width: int) -> Tensor:
    """Return the leading eigenvectors of the signals' second moments, as columns."""
    moments: Tensor | float = 0.0
    for signal in signals:
        rows = signal.flatten(0, -2).double()
        moments = moments + rows.mT @ rows
    assert isinstance(moments, Tensor)
    vectors = torch.linalg.eigh(moments)[1].flip(1)
    return vectors[:, :width].float().contiguous()


def _read_in(linear: nn.Linear, basis: Tensor) -> None:
    _set(linear, linear.weight @ basis)


def _write_in(linear: nn.Linear, basis: Tensor) -> None:
    _set(linear, basis.mT @ linear.weight)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias @ basis)


def _set(module: Any, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
