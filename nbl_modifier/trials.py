"""Measured losses: what a replacement does to the model on held-out windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .architectures import Architecture
from .evaluation.perplexity import PerplexityResult, summarize
from .forward import PartialForward
from .surgery import Replacement, replaced
from .windows import Windows

__all__ = ["Trials"]


class Trials:
    """
    Losses of a model, as it is and with single layers replaced, on the same windows.

    :param forward: the model
    :param architecture: its family
    :param windows: held out of what the replacements were fitted on
    """

    def __init__(
        self, forward: PartialForward, architecture: Architecture, windows: Windows
    ) -> None:
        self._forward = forward
        self._architecture = architecture
        self._windows = windows

    def loss(
        self, replacements: Mapping[int, Replacement] | None = None
    ) -> PerplexityResult:
        """
        Return the loss of the model.

        :param replacements: put in for the trial, by decoder layer index
        """
        layers = self._forward.layers
        with replaced(layers, self._architecture, replacements or {}):
            return self._measure([None] * len(self._windows.batches), 0)

    def single_losses(
        self, replacements: Mapping[int, Replacement]
    ) -> dict[int, PerplexityResult]:
        """
        Return the loss with each replacement put in alone, by decoder layer index.

        A trial of layer i runs the layers from i on; those before it run once.

        :param replacements: by decoder layer index
        """
        streams: list[Tensor | None] = [None] * len(self._windows.batches)
        layers, start, losses = self._forward.layers, 0, {}
        for index in tqdm(sorted(replacements), "NBL: trying layers", leave=False):
            for number, batch in enumerate(self._windows.batches):
                stream = self._forward.hidden_states(
                    batch, index, streams[number], start
                )
                streams[number] = None if stream is None else stream.cpu()
            start = index
            trial = {index: replacements[index]}
            with replaced(layers, self._architecture, trial):
                losses[index] = self._measure(streams, start)
        return losses

    def _measure(
        self, streams: Sequence[Tensor | None], start: int
    ) -> PerplexityResult:
        sums: list[float] = []
        counts: list[int] = []
        for number, batch in enumerate(self._windows.batches):
            logits = self._forward.logits(batch, streams[number], start)
            targets = self._windows.targets(number)
            for row in range(len(targets)):
                sums.append(
                    _nll_sum(logits[row], batch["input_ids"][row], targets[row])
                )
                counts.append(int(targets[row].sum()))
        return summarize(sums, counts)


def _nll_sum(logits: Tensor, tokens: Tensor, targets: Tensor) -> float:
    """
    Return the negative log-likelihood of the target tokens of one window, in nats.

    :param logits: ``[tokens, vocabulary]``
    :param tokens: ``[tokens]``
    :param targets: bool ``[tokens]``, not the first
    """
    positions = targets.nonzero().flatten()
    # one window at a time: a float32 copy of all logits would be the peak in memory
    predicted = logits[(positions - 1).to(logits.device)].float()
    wanted = tokens[positions].to(logits.device)
    nll = cross_entropy(predicted, wanted, reduction="none")
    return nll.double().sum().item()
