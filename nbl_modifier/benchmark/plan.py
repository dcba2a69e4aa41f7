# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measures and how, and what came of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .roofline import Kernel
from .serving import Loaded
from .shapes import Model
from .timing import Timing

__all__ = ["Benchmark", "Cell", "Grid", "Settings"]


@dataclass(frozen=True)
class Grid:
    """
    What to measure.

    :param contexts: prompt tokens per sequence
    :param batches: sequences at once
    :param generate: tokens to generate per sequence
    :param rounds: how often
    :param max_seconds: leave out what would take longer per round even at the machine's
        peak
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    generate: int
    rounds: int
    max_seconds: float


@dataclass(frozen=True)
class Settings:
    """
    How to measure; the fields of :class:`~.serving.Job` that both models share.

    :param together: both engines in memory at once, so that they are measured within
        moments of each other; otherwise one after the other, anew in each round. None:
        at once if they fit
    :param on_accelerator: whether there is one
    :param show_log: whether the engines' logs go to the terminal
    """

    engine: Literal["vllm", "transformers"]
    attention: Literal["eager", "sdpa"] = "sdpa"
    random_weights: bool = False
    eager: bool = False
    kv_cache_gib: int | None = None
    memory_fraction: float = 0.9
    engine_args: dict[str, Any] = field(default_factory=dict)
    together: bool | None = None
    on_accelerator: bool = False
    show_log: bool = False

    @property
    def kernel(self) -> Kernel:
        """How attention is computed."""
        return Kernel.PAGED if self.engine == "vllm" else Kernel(self.attention)


@dataclass(frozen=True)
class Cell:
    """
    One grid point.

    :param context: prompt tokens per sequence
    :param batch: sequences
    """

    context: int
    batch: int


@dataclass
class Benchmark:
    """
    Everything about one benchmark; pairs hold the base model's first.

    :param models: the two models
    :param grid: what to measure
    :param settings: how it is measured
    :param loaded: what the engines have loaded, by number
    :param timings: of each cell that was measured, one per round
    :param skipped: why a cell was not measured
    """

    models: tuple[Model, Model]
    grid: Grid
    settings: Settings
    loaded: dict[int, Loaded] = field(default_factory=dict)
    timings: dict[Cell, tuple[list[Timing], list[Timing]]] = field(default_factory=dict)
    skipped: dict[Cell, str] = field(default_factory=dict)

    def skip(self, cell: Cell, reason: str) -> None:
        """Leave a cell out from here on, and forget what was measured of it."""
        self.skipped[cell] = reason
        self.timings.pop(cell, None)
