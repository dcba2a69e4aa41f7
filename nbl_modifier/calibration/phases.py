"""
The phases of a run and how often each runs the model, from arithmetic alone. Standard
library only.

A new kind of phase is one entry in :func:`plan`; what runs it calls
:meth:`Progress.start` with its name, and everything that runs the model through
``PartialForward`` is counted by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Phase", "Settings", "plan"]

# Trials per step of greedy selection, of the first few layers: most are not needed.
_TRIED_AGAIN = 2


@dataclass(frozen=True)
class Phase:
    """
    A part of a run.

    :param name: what it does
    :param layers: how often a decoder layer runs over a window, forward
    :param heads: how often the head does
    :param backward: how often a decoder layer is differentiated over a window
    :param measured: layers whose statistics are taken, over all windows, and solved
    """

    name: str
    layers: int = 0
    heads: int = 0
    backward: int = 0
    measured: int = 0

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            self.name,
            self.layers + other.layers,
            self.heads + other.heads,
            self.backward + other.backward,
            self.measured + other.measured,
        )


@dataclass(frozen=True)
class Settings:
    """
    What a run does, as far as it decides about its cost.

    :param num_layers: decoder layers of the model, K
    :param windows: calibration windows, held-out ones included
    :param held_out: of these, those that losses are measured on
    :param candidates: decoder layers to choose from
    :param count: how many of them to replace, at most
    :param tried: whether the criterion tries each candidate on held-out windows
    :param limited: whether the loss of each step is measured to end the choice
    :param greedy: whether the candidates left are measured, or tried, again after each
        step
    :param refit: whether the chosen layers are fitted again
    :param epochs: of distillation, at most
    :param rates: learning rates that are tried before
    :param few: windows that each of them is tried on
    :param recomputes: whether backward runs each layer again
    :param measures: whether statistics are taken, not read
    :param repeating: windows besides the held-out ones that trials run on
    """

    num_layers: int
    windows: int
    held_out: int
    candidates: Sequence[int]
    count: int
    tried: bool = False
    limited: bool = False
    greedy: bool = False
    refit: bool = False
    epochs: int = 0
    rates: int = 0
    few: int = 0
    recomputes: bool = True
    measures: bool = True
    repeating: int = 0

    def spread(self) -> list[int]:
        """Return a choice before one is made: evenly spread over the candidates."""
        total = len(self.candidates)
        return [
            self.candidates[int((i + 0.5) * total / self.count)]
            for i in range(self.count)
        ]


def plan(settings: Settings, order: Sequence[int] | None = None) -> list[Phase]:
    """
    Return the phases of a run.

    :param settings: what it does
    :param order: the layers that are chosen, the first one in front. Before that is
        known they are taken to be spread evenly, on which greedy selection, refit and
        distillation depend a little
    """
    order = settings.spread() if order is None else order
    phases = []
    if settings.measures:
        runs = settings.num_layers * settings.windows
        phases.append(Phase("measuring", runs, measured=len(settings.candidates)))
    phases.append(sum(_selection(settings, order), Phase("selection")))
    if settings.refit:
        phases.append(_refit(settings, max(order), len(order)))
    if settings.epochs:
        phases.append(_distillation(settings, min(order), max(order)))
    return [phase for phase in phases if phase != Phase(phase.name)]


def _selection(settings: Settings, order: Sequence[int]) -> Iterator[Phase]:
    yield _loss(settings)  # of the base model, whose streams are kept
    yield Phase("repeating", settings.num_layers * settings.repeating)
    again = settings.greedy and not settings.tried
    left = sorted(settings.candidates)
    if settings.tried:
        yield _trials(settings, left)
    for number, index in enumerate(order):
        if number > 0 and again:
            runs = (left[-1] + 1) * settings.windows
            yield Phase("selection", runs, measured=len(left))
        if number > 0 and settings.tried and settings.greedy:
            yield sum([_trial(settings)] * _TRIED_AGAIN, Phase("trials"))
        if settings.limited and not settings.tried:
            yield _loss(settings)
        left.remove(index)
    if order and not settings.limited and not (settings.greedy and settings.tried):
        yield _loss(settings)  # of the model with all of them


def _loss(settings: Settings) -> Phase:
    """Return one run over the held-out windows."""
    held_out = settings.held_out
    return Phase("loss", settings.num_layers * held_out, heads=held_out)


def _trial(settings: Settings) -> Phase:
    """Return one run over all that is tried on, beside what the original predicts."""
    windows = settings.held_out + settings.repeating
    return Phase("trial", settings.num_layers * windows, heads=2 * windows)


def _trials(settings: Settings, left: Sequence[int]) -> Phase:
    """Return what trying each layer alone takes; those before it run once for all."""
    layers = left[-1] + sum(settings.num_layers - i for i in left)
    windows = settings.held_out + settings.repeating
    return Phase("trials", layers * windows, heads=(1 + len(left)) * windows)


def _refit(settings: Settings, last: int, count: int) -> Phase:
    """Return the two streams, up to the last layer, and trials before and after."""
    streams = Phase("refit", (2 * last + 1) * settings.windows, measured=count)
    return streams + _trial(settings) + _trial(settings)


def _distillation(settings: Settings, first: int, last: int) -> Phase:
    """Return the original model, then, per window, layers forward and backward."""
    num_layers = settings.num_layers
    windows = settings.windows - settings.held_out
    few = min(settings.few, windows)
    steps = settings.rates * few + settings.epochs * windows
    behind = num_layers - first
    again = behind if settings.recomputes else 0
    training = Phase(
        "distillation",
        (last + 1) * few + num_layers * windows + steps * (num_layers + again),
        heads=windows + steps * 2,
        backward=steps * behind,
    )
    trials = 1 + settings.rates + settings.epochs
    return sum([_trial(settings)] * trials, training)
