"""Hooks on the layers of a running model: activations in, sums of statistics out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from nbl_modifier.layer_statistics.moments import (
    HeldoutStatistics,
    LayerStatistics,
    check_causal,
    valid_tokens,
)

from .layers import MeasuredLayers

__all__ = ["BatchInFlight", "LayerObserver", "Sums"]

#: Sums of the tokens of one layer that are fitted on, and of those that are held out.
#: What is stored must serve any estimator and may yet be fitted on: all sums of both.
Sums = tuple[LayerStatistics | None, LayerStatistics | HeldoutStatistics | None]


@dataclass(frozen=True)
class BatchInFlight:
    """
    What hooks have to know of the batch that runs, beside what their layer is given.

    :param number: in the calibration set, from 0
    :param loss_mask: nonzero where a token counts, ``[batch, tokens]``; None: all do
    :param mask_implementation: the attention implementation that the model makes its
        masks for, such as ``eager``
    """

    number: int
    loss_mask: Tensor | None
    mask_implementation: str


class LayerObserver:
    """
    Adds up the statistics of the layers in flight.

    What is fitted is what attention adds to the residual stream: its output, through
    the norm that some families have behind it. The bound is on the stream after that
    addition, and what is linear in its input is the addition, not what a norm makes of
    it; a linear map of attention's output alone would also lose the shrinkage that
    makes an uncertain estimate a good one, which the norm undoes.

    :param layers: what is measured
    :param held_out: numbers of the batches that are summed up apart
    :param whole: whether the statistics of these, too, are to serve any estimator
    :param streams: residual stream by batch, ``[batch, tokens, d]``, that the estimator
        reads instead of the model's own. Its target becomes what leads from there to
        the model's own stream behind the layer
    """

    def __init__(
        self,
        layers: MeasuredLayers,
        held_out: Collection[int] = (),
        *,
        whole: bool = False,
        streams: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._layers = layers
        self._held_out = held_out
        self._whole = whole
        self._streams = streams
        self._residuals: dict[int, tuple[int, Tensor]] = {}
        self._statistics: dict[int, LayerStatistics] = {}
        self._heldout: dict[int, LayerStatistics | HeldoutStatistics] = {}

    def watch(
        self,
        index: int,
        register: Callable[..., Any],
        in_flight: Callable[[], BatchInFlight],
        guarded: Callable[[Callable[..., None]], Callable[..., None]],
    ) -> None:
        """
        Register the hooks that see one layer.

        :param index: the decoder layer
        :param register: given module, hook, its kind as in ``register_<kind>_hook`` and
            keyword arguments for that, registers it for who removes it again
        :param in_flight: called while a batch runs, says which
        :param guarded: returns a hook as it is to be registered, for those that add to
            statistics
        """
        if self._layers.spec.kind == "block":
            see = guarded(partial(self._see_block, in_flight, index))
            register(self._layers.modules[index], see, "forward", with_kwargs=True)
            return
        norm = self._layers.input_norm(index)
        if norm is not None:
            keep = partial(self._see_norm_input, in_flight, index)
            register(norm, keep, "forward_pre")
        see = guarded(partial(self._see_attention, in_flight, index))
        register(self._layers.attention(index), see, "forward", with_kwargs=True)

    def take(self, index: int) -> Sums:
        """
        Return the sums of a layer, and forget them; None of what saw no batch.

        :param index: of the decoder layer
        """
        return self._statistics.pop(index, None), self._heldout.pop(index, None)

    def _see_norm_input(
        self,
        in_flight: Callable[[], BatchInFlight],
        index: int,
        _module: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        """Forward-pre hook on the input norm: keep the residual stream, R."""
        self._residuals[index] = (in_flight().number, args[0])

    def _see_attention(
        self,
        in_flight: Callable[[], BatchInFlight],
        index: int,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, ...],
    ) -> None:
        """
        Forward hook on attention: add the batch to the layer's statistics.

        :raises RuntimeError: if the pipeline lost the causal mask, or ran norm and
            attention in different passes
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        started_at = time.perf_counter()
        name = self._layers.names[index]
        normalized = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch = in_flight()
        number, residual = batch.number, normalized
        if self._layers.architecture.input_norm is not None:
            number, residual = self._residuals.pop(index, (-1, None))
        if residual is None or number != batch.number:
            raise RuntimeError(
                f"{name}: its input norm ran on another batch than attention did. Set "
                "sequential_targets to the decoder layer class, or leave it unset."
            )
        added = self._layers.added_to_stream(index, output[0])
        mask = kwargs.get("attention_mask")
        self._add(batch, index, mask, residual, normalized, added, started_at)

    def _see_block(
        self,
        in_flight: Callable[[], BatchInFlight],
        index: int,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        """
        Forward hook on a decoder layer: add the batch to the layer's statistics.

        :raises RuntimeError: if the pipeline lost the causal mask
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        started_at = time.perf_counter()
        residual = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # in float32: a difference of streams, smaller than either
        added = output.float() - residual.float()
        mask = kwargs.get("attention_mask")
        self._add(in_flight(), index, mask, residual, residual, added, started_at)

    def _add(
        self,
        batch: BatchInFlight,
        index: int,
        mask: Tensor | None,
        residual: Tensor,
        normalized: Tensor,
        added: Tensor,
        started_at: float,
    ) -> None:
        """
        Add one batch to the statistics of one layer.

        :param batch: which it is
        :param mask: as called with, ``[batch, 1, tokens, tokens]`` or None
        :param residual: the stream before what is replaced, ``[batch, tokens, d]``
        :param normalized: what attention reads of it, ``[batch, tokens, d]``
        :param added: what is added to it there, ``[batch, tokens, d]``
        :param started_at: when the hook began
        """
        name, attention = self._layers.names[index], self._layers.attention(index)
        check_causal(name, attention, batch.mask_implementation, mask)
        valid = valid_tokens(normalized, mask, batch.loss_mask)
        if self._streams is not None:
            # without one the layer is the first, and its input is the model's own
            stream = self._streams.get(batch.number, residual).to(residual.device)
            # in float32: a difference of streams, far smaller than either
            added = (residual.float() - stream.float()) + added.float()
            residual = stream
            if self._layers.read_normalized:
                normalized = self._layers.normalized(index, stream)
        statistics = self._statistics_of(index, batch.number, normalized)
        statistics.update(residual, normalized, added, valid)
        statistics.seconds += time.perf_counter() - started_at

    def _statistics_of(
        self, index: int, number: int, like: Tensor
    ) -> LayerStatistics | HeldoutStatistics:
        """Return what the rows of a batch are added to: for the fit, or held out."""
        name, normalized = self._layers.names[index], self._layers.read_normalized
        form = (name, like.shape[-1], normalized, like.device)
        if number not in self._held_out:
            if index not in self._statistics:
                self._statistics[index] = LayerStatistics(*form)
            return self._statistics[index]
        if index not in self._heldout:
            kind = LayerStatistics if self._whole else HeldoutStatistics
            self._heldout[index] = kind(*form)
        return self._heldout[index]
