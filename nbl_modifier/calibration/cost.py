"""
What a run is going to cost: forward passes, tokens and memory from arithmetic alone,
and the time that is left once something has been timed. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .phases import Phase

__all__ = [
    "Cost",
    "Progress",
    "duration",
    "statistics_bytes",
]

# A backward pass through a layer whose weights are not trained computes the gradient of
# its input, which takes what the forward pass does.
_BACKWARD = 1.0


def statistics_bytes(
    hidden_size: int, *, normalized: bool, held_out: bool, stored: bool
) -> int:
    """
    Return what the statistics of one layer take at most, until it is solved.

    In float64 matrices of ``hidden_size`` squared; symmetric sums are one triangle. The
    sums turn into moments first, of which there are three, or five with the input
    norm's output; to solve these there are four matrices more.

    :param hidden_size: d
    :param normalized: whether the output of the input norm is measured, too
    :param held_out: whether the held-out windows are kept apart
    :param stored: whether these are to serve whatever is asked for later
    """
    sums, moments = (3.5, 5.0) if normalized else (2.0, 3.0)
    more_sums, more_moments = (sums, moments) if stored else (1.5, 2.0)
    if not held_out:
        more_sums = more_moments = 0.0
    divided = sums + moments + more_sums + more_moments
    solved = moments + 4.0 + more_moments
    return int(8 * max(divided, solved) * hidden_size**2)


@dataclass(frozen=True)
class Cost:
    """
    What a run is going to cost.

    :param num_layers: decoder layers of the model
    :param windows: calibration windows, of this process
    :param tokens: in all of them
    :param phases: in the order in which they run
    :param head: work of the head on a window, over that of a decoder layer
    :param statistics_bytes: see :func:`statistics_bytes`
    :param stream_bytes: of the residual streams that are kept on the CPU
    """

    num_layers: int
    windows: int
    tokens: int
    phases: Sequence[Phase]
    head: float = 0.0
    statistics_bytes: int = 0
    stream_bytes: int = 0

    @property
    def passes(self) -> float:
        """Forward passes, each of all layers over all windows."""
        return sum(map(self.passes_of, self.phases))

    def passes_of(self, phase: Phase) -> float:
        """Return the forward passes of one phase."""
        # there are no windows where all is read from statistics
        return phase.layers / (self.num_layers * max(1, self.windows))

    def work(self, phase: Phase) -> float:
        """Return the work of a phase, in runs of a layer over a window."""
        return phase.layers + self.head * phase.heads + _BACKWARD * phase.backward

    def __str__(self) -> str:
        parts = [f"{each.name} {self.passes_of(each):.1f}" for each in self.phases]
        text = (
            f"{self.passes:.1f} forward passes over {self.windows:,} windows with "
            f"{self.tokens:,} tokens ({', '.join(parts)}); statistics of a layer take "
            f"up to {self.statistics_bytes / 1e9:.3g} GB"
        )
        if self.stream_bytes:
            text += f", residual streams on the CPU {self.stream_bytes / 1e9:.3g} GB"
        return text


class Progress:
    """
    How far a run is, in one line for all of it.

    :param cost: of the run
    :param show: called whenever something has been done
    :param clock: in seconds
    """

    def __init__(
        self,
        cost: Cost,
        show: Callable[[Progress], object] = lambda _progress: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cost = cost
        self._show = show
        self._clock = clock
        self._started_at: float | None = None
        #: name of what is running
        self.phase = cost.phases[0].name if cost.phases else ""
        self._total = self._in_phase = Phase("done")
        self._measuring_seconds = 0.0

    @property
    def passes(self) -> float:
        """Forward passes so far, counted."""
        return self.cost.passes_of(self._total)

    @property
    def seconds(self) -> float:
        """Since :meth:`begin`."""
        return 0.0 if self._started_at is None else self._clock() - self._started_at

    def begin(self) -> None:
        """Start the clock, if it does not run yet."""
        if self._started_at is None:
            self._started_at = self._clock()

    def start(self, name: str) -> None:
        """
        Enter a phase: those before it are over, whatever they took.

        :param name: of a phase of the plan
        """
        self.begin()
        self.phase, self._in_phase = name, Phase("done")

    def ran(self, layers: int, heads: int = 0, backward: int = 0) -> None:
        """Count work, see :class:`Phase`."""
        self._add(Phase("done", layers, heads, backward))

    def measured(self, seconds: float) -> None:
        """
        Count a layer that is measured.

        :param seconds: that its statistics and their solution took
        """
        self._measuring_seconds += seconds
        self._add(Phase("done", measured=1))

    def _add(self, more: Phase) -> None:
        self._total += more
        self._in_phase += more
        self._show(self)

    @property
    def line(self) -> str:
        """All of it in a line."""
        line = f"NBL: {self.phase}, {self.passes:.1f} of {self.cost.passes:.1f} passes"
        left = self.seconds_left()
        return line if left is None else f"{line}, about {duration(left)} left"

    @property
    def part(self) -> float:
        """The part of the work that is done, in [0, 1]."""
        total = sum(map(self.cost.work, self.cost.phases))
        left = sum(work for work, _ in self._left())
        return 1.0 - left / total if total else 1.0

    def seconds_left(self) -> float | None:
        """
        Return the time to the end of the run, or None if nothing can be told yet.

        Running the model and measuring layers are timed apart: phases have more of one
        or of the other.
        """
        work = self.cost.work(self._total)
        if work == 0 or self._started_at is None:
            return None
        per_work = max(0.0, self.seconds - self._measuring_seconds) / work
        per_layer = self._measuring_seconds / max(1, self._total.measured)
        return sum(work * per_work + count * per_layer for work, count in self._left())

    def _left(self) -> Iterator[tuple[float, int]]:
        """Yield work and measured layers that are left, phase by phase."""
        names = [phase.name for phase in self.cost.phases]
        now = names.index(self.phase) if self.phase in names else 0
        for phase in self.cost.phases[now:]:
            done = self._in_phase if phase.name == self.phase else Phase("done")
            yield (
                max(0.0, self.cost.work(phase) - self.cost.work(done)),
                max(0, phase.measured - done.measured),
            )


def duration(seconds: float) -> str:
    """Return a time for people, of two digits or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
