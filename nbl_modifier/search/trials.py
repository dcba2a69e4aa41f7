"""
Measured losses: what replacements do to the model on held-out windows.

With several processes each runs its own windows. All hear what came of each window, in
the order of their ranks, and add up the same numbers, so they take the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from nbl_modifier.architectures import Architecture
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.evaluation.perplexity import PerplexityResult
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.replacement.surgery import Replacement, replaced

from .predictions import Sums, target_tokens

__all__ = ["OriginalLogits", "Trial", "Trials"]


@dataclass(frozen=True)
class Trial:
    """
    The model with something replaced.

    :param loss: negative log-likelihood of the held-out windows
    :param kl: mean Kullback-Leibler divergence of its next-token distribution from the
        original model's, in nats per token
    """

    loss: PerplexityResult
    kl: float

    @classmethod
    def of(cls, sums: Sums) -> Trial:
        """
        Return the means over all windows.

        :param sums: over the tokens of each
        """
        return cls(sums.loss(), sums.divergence())


class OriginalLogits:
    """
    What the original model predicts, each window run once.

    The residual stream behind the last layer is kept, on the CPU, and the head computes
    the logits from it again: of a vocabulary they would be hundreds of times as large.

    :param forward: the model; whenever it is asked, with nothing replaced
    :param windows: what it predicts
    """

    def __init__(self, forward: PartialForward, windows: Windows) -> None:
        self._forward = forward
        self._windows = windows
        self._streams: dict[int, Tensor] = {}

    def of(self, number: int) -> Tensor:
        """
        Return the logits of a batch, ``[batch, tokens, vocabulary]``.

        :param number: of the batch
        """
        self.run(number)
        batch, end = self._windows.batches[number], len(self._forward.layers)
        return self._forward.logits(batch, self._streams[number], end)

    def run(self, number: int) -> None:
        """
        Run the original model on a batch, unless it has.

        :param number: of the batch
        """
        if number not in self._streams:
            batch, end = self._windows.batches[number], len(self._forward.layers)
            stream = self._forward.hidden_states(batch, end)
            assert stream is not None
            self._streams[number] = stream.cpu()


class Trials:
    """
    Trials of a model on the same windows, which leave it as it is.

    :param forward: the model
    :param architecture: its family
    :param windows: held out of what the replacements were fitted on; of this process
    :param repeats: more of them, on which the divergence counts and the loss does not
    """

    def __init__(
        self,
        forward: PartialForward,
        architecture: Architecture,
        windows: Windows,
        repeats: Windows | None = None,
    ) -> None:
        self._forward = forward
        self._architecture = architecture
        self._with_loss = range(len(windows.batches))
        self._windows = windows if repeats is None else windows.and_then(repeats)
        self._original = OriginalLogits(forward, self._windows)
        self._ranks = Ranks()

    def original(self) -> Trial:
        """Return how the original model does; nothing must be replaced."""
        sums = Sums()
        with self._pooling(sums):
            for number in self._with_loss:
                targets = target_tokens(self._windows, number)
                sums.add(targets, self._original.of(number))
        return Trial.of(sums)

    def loss(
        self, replacements: Mapping[int, Replacement] | None = None
    ) -> PerplexityResult:
        """
        Return the loss of the model.

        :param replacements: put in for the trial, by decoder layer index
        """
        sums = Sums()
        layers = self._forward.layers
        with (
            self._pooling(sums),
            replaced(layers, self._architecture, replacements or {}),
        ):
            for number in self._with_loss:
                targets = target_tokens(self._windows, number)
                batch = self._windows.batches[number]
                sums.add(targets, self._forward.logits(batch))
        return sums.loss()

    def together(self, replacements: Mapping[int, Replacement]) -> Trial:
        """
        Try all replacements at once.

        :param replacements: by decoder layer index
        """
        sums = Sums()
        layers = self._forward.layers
        with (
            self._pooling(sums),
            replaced(layers, self._architecture, replacements) as undone,
        ):
            for number, batch in enumerate(self._windows.batches):
                with undone():
                    original = self._original.of(number)
                targets = target_tokens(self._windows, number)
                logits = self._forward.logits(batch)
                sums.add(targets, logits, original, number in self._with_loss)
        return Trial.of(sums)

    def single(
        self,
        candidates: Mapping[int, Replacement],
        given: Mapping[int, Replacement] | None = None,
    ) -> dict[int, Trial]:
        """
        Try each candidate alone.

        A trial of layer i runs the layers from i on; those before it run once.

        :param candidates: by decoder layer index
        :param given: put in for all of them, by decoder layer index
        """
        sums = {index: Sums() for index in sorted(candidates)}
        with self._pooling(*sums.values()):
            for number in range(len(self._windows.batches)):
                self._try_on(number, sums, candidates, given or {})
        return {index: Trial.of(sum_) for index, sum_ in sums.items()}

    def _try_on(
        self,
        number: int,
        sums: Mapping[int, Sums],
        candidates: Mapping[int, Replacement],
        given: Mapping[int, Replacement],
    ) -> None:
        """Try candidates alone on one batch, and add what comes of each to its sums."""
        layers, architecture = self._forward.layers, self._architecture
        batch = self._windows.batches[number]
        targets = target_tokens(self._windows, number)
        original = self._original.of(number)
        stream, start = None, 0
        with replaced(layers, architecture, given):
            for index, sum_ in sums.items():
                stream = self._forward.hidden_states(batch, index, stream, start)
                start = index
                trial = {index: candidates[index]}
                with replaced(layers, architecture, trial):
                    logits = self._forward.logits(batch, stream, start)
                sum_.add(targets, logits, original, number in self._with_loss)

    @contextmanager
    def _pooling(self, *sums: Sums) -> Iterator[None]:
        """Add this process's windows inside; after it the sums have those of all."""
        with self._ranks.failing_together():
            yield
        found = self._ranks.gather(sums)
        for mine, *parts in zip(sums, *found, strict=True):
            mine.join(parts)
