"""
Forward passes of a live model, from one decoder layer to another.

The model's own forward runs, so masks, positions and whatever else a family computes
around its layers are the model's: layers outside of the wanted part only hand on what
they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nbl_modifier.architectures import Architecture
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.layer_statistics.windows import Batch
from nbl_modifier.numerics.products import FastProducts
from nbl_modifier.replacement.surgery import copied_bytes

from .cost import Progress

__all__ = ["PartialForward", "calling", "recomputes"]

# Columns of a calibration set that say what to predict; with them a model would compute
# a loss of its own.
_NOT_INPUTS = {"labels", "loss_mask"}
# What a graph may hold until backward has run.
_KEPT_BYTES = 2**30


class PartialForward:
    """
    The decoder of a causal language model, to be run in parts.

    ``start`` and ``stop`` are decoder layer indices as in a slice. Layers may be
    exchanged between two calls, and hooks on the layers that run see them.

    :param model: the causal language model, weights on any device or offloaded
    :param architecture: its family
    :param progress: told what has run
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        progress: Progress | None = None,
    ) -> None:
        self.layers = decoder_layers(model, architecture)
        self._model = model
        self._progress = progress

    @property
    def mask_implementation(self) -> str:
        """The attention implementation that the model makes its masks for."""
        return str(self._model.config._attn_implementation)

    def start(self, phase: str) -> None:
        """
        Tell the progress that a phase begins.

        :param phase: its name, see :class:`Phase`
        """
        if self._progress is not None:
            self._progress.start(phase)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The model's."""
        return self._model.parameters()

    def hidden_states(
        self,
        batch: Batch,
        stop: int,
        hidden_states: Tensor | None = None,
        start: int = 0,
    ) -> Tensor | None:
        """
        Return the residual stream in front of layer ``stop``, behind ``stop - 1``.

        The final norm runs on it, too, for nothing.

        :param batch: what the model is called with
        :param stop: the first layer not to run, ``>= start``
        :param hidden_states: the stream in front of ``start``, ``[batch, tokens, d]``;
            None: the embeddings, ``start`` is 0
        :param start: the first layer to run
        :return: ``[batch, tokens, d]``, or ``hidden_states`` itself if no layer runs
        """
        if start == stop:
            return hidden_states
        seen: list[Tensor] = []
        handle = self.layers[stop - 1].register_forward_hook(
            lambda _module, _args, output: seen.append(output)
        )
        try:
            with (
                self._skipping(range(start), hidden_states),
                self._skipping(range(stop, len(self.layers)), None),
                calling(self._model.get_output_embeddings(), lambda hidden: hidden),
            ):
                self._call(batch)
        finally:
            handle.remove()
        self._ran(batch, stop - start)
        return seen[0]

    def logits(
        self, batch: Batch, hidden_states: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """
        Return the logits, ``[batch, tokens, vocabulary]``, in the dtype of the model.

        llm-compressor keeps the head on the meta device while it calibrates
        (llmcompressor 0.14.0.1, utils/helpers.py, ``disable_lm_head``); it computes
        here.

        :param batch: what the model is called with
        :param hidden_states: as in :meth:`hidden_states`
        :param start: the first layer to run
        """
        with self._computing_head(), self._skipping(range(start), hidden_states):
            logits: Tensor = self._call(batch).logits
        self._ran(batch, len(self.layers) - start, heads=1)
        return logits

    def differentiable_logits(self, batch: Batch, start: int) -> Tensor:
        """
        Return the logits with the graph that leads back to what requires a gradient.

        Where the graph of all layers would be large, it holds the input of each only;
        backward runs the layer again (Chen et al. 2016, arXiv:1604.06174).

        :param batch: what the model is called with
        :param start: the first layer in which something requires a gradient
        :return: ``[batch, tokens, vocabulary]``, in the dtype of the model
        """
        with ExitStack() as stack:
            stack.enter_context(self._computing_head())
            stack.enter_context(FastProducts())
            tokens = batch["input_ids"].numel()
            total = len(self.layers)
            again_at = start if recomputes(self._model, tokens) else total
            for layer in self.layers[again_at:]:
                again = partial(
                    checkpoint,
                    layer.forward,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    # for the two runs of the layer; backward's is outside of any other
                    context_fn=lambda: (nullcontext(), FastProducts()),
                )
                stack.enter_context(calling(layer, again))
            stack.enter_context(torch.enable_grad())
            logits: Tensor = self._model(**self._inputs(batch), use_cache=False).logits
        self._ran(batch, 2 * total - again_at, heads=1, backward=total - start)
        return logits

    def _ran(
        self, batch: Batch, layers: int, heads: int = 0, backward: int = 0
    ) -> None:
        if self._progress is not None:
            windows = len(batch["input_ids"])
            self._progress.ran(layers * windows, heads * windows, backward * windows)

    def _computing_head(self) -> AbstractContextManager[None]:
        head = self._model.get_output_embeddings()
        return calling(head, type(head).forward.__get__(head))

    def _call(self, batch: Batch) -> Any:
        with torch.no_grad():
            return self._model(**self._inputs(batch), use_cache=False)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        device = self._device
        return {
            name: values.to(device)
            for name, values in batch.items()
            if name not in _NOT_INPUTS
        }

    @property
    def _device(self) -> torch.device:
        # of an offloaded weight, access gives the copy on the device that computes
        weight: Tensor = self._model.get_input_embeddings().get_parameter("weight")
        return weight.device

    @contextmanager
    def _skipping(
        self, indices: Iterable[int], hidden_states: Tensor | None
    ) -> Iterator[None]:
        """Let layers return ``hidden_states``, or what they get if that is None."""

        def skip(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden if hidden_states is None else hidden_states.to(hidden.device)

        with ExitStack() as stack:
            for index in indices:
                stack.enter_context(calling(self.layers[index], skip))
            yield


def recomputes(model: PreTrainedModel, tokens: int) -> bool:
    """
    Return whether a graph over all layers would hold too much to be kept.

    By what a layer of Llama's kind keeps of a token: a dozen vectors of the hidden
    size, norms' in float32, and three of the MLP's. With them it holds the weights that
    are offloaded and copied to where they compute: all of a model that does not fit.

    :param model: the causal language model
    :param tokens: that it is called with at a time
    """
    config = model.config.get_text_config()
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    values = (16 * config.hidden_size + 3 * width) * config.num_hidden_layers
    kept = tokens * values * model.dtype.itemsize + copied_bytes(model)
    return bool(kept > _KEPT_BYTES)


@contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward; unlike an assignment, leave no trace of it after."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
