# SPDX-License-Identifier: Apache-2.0
"""Measure two models over a grid, in turn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from nbl_modifier.records.speed import SpeedReport

from .engines import Engine
from .limits import fit_together, reason_to_skip
from .machine import free_memory
from .plan import Benchmark, Cell, Grid, Settings
from .serving import EngineError, Job
from .shapes import Model
from .summary import make_report

__all__ = ["run"]

# Steps that are generated for nothing, so that what is allocated once is.
_WARM_UP_TOKENS = 4
# vLLM reads long prompts in pieces of at least this many tokens.
_SMALLEST_PASS = 2048
# Blocks of vLLM's KV cache divide it, so that no part of one is left over.
_LENGTH_MULTIPLE = 256

Progress = Callable[[str], None]


def run(
    base: Model,
    compressed: Model,
    grid: Grid,
    settings: Settings,
    progress: Progress,
) -> SpeedReport:
    """
    Measure both models and return the report.

    :param base: the model before compression
    :param compressed: and after
    :param grid: what to measure
    :param settings: how it is measured
    :param progress: called with a line of text before each step
    :raises ValueError: if no grid point fits the models' positions
    :raises RuntimeError: if an engine dies
    """
    if settings.together is None:
        together = fit_together((base, compressed), settings, free_memory())
        if not together:
            progress("both models do not fit in memory at once: loading them in turn")
        settings = replace(settings, together=together)
    benchmark = Benchmark((base, compressed), grid, settings)
    limit = min(base.max_context, compressed.max_context)
    cells = [Cell(c, b) for c in grid.contexts for b in grid.batches]
    for cell in cells:
        if cell.context + grid.generate > limit:
            benchmark.skip(
                cell,
                f"{cell.context} + {grid.generate} tokens, the model has {limit} "
                "positions",
            )
    cells = [cell for cell in cells if cell not in benchmark.skipped]
    if not cells:
        raise ValueError(
            f"--context: none of {', '.join(map(str, grid.contexts))} and "
            f"{grid.generate} generated tokens fits the {limit} positions of "
            f"{base.name}. Pass a shorter --context or fewer --generate-tokens."
        )
    measure = _together if settings.together else _in_turn
    measure(benchmark, cells, progress)
    return make_report(benchmark)


def _job(benchmark: Benchmark, number: int, cells: list[Cell]) -> Job:
    model, settings = benchmark.models[number], benchmark.settings
    largest = max(cell.batch * cell.context for cell in cells)
    # Sequences that are ready generate while others are still being read.
    early = math.ceil(largest / _SMALLEST_PASS) + 1
    longest = max(cell.context for cell in cells) + benchmark.grid.generate + early
    rounded = math.ceil(longest / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    return Job(
        model=model.name,
        engine=settings.engine,
        dtype=model.dtype,
        random_weights=settings.random_weights,
        attention=settings.attention,
        max_model_len=min(rounded, *(each.max_context for each in benchmark.models)),
        max_batch=max(cell.batch for cell in cells),
        vocab_size=model.vocab_size,
        has_attention=len(model.linearized) < model.num_layers,
        weight_bytes=model.shape.weight_bytes,
        eager=settings.eager,
        kv_cache_gib=settings.kv_cache_gib,
        memory_fraction=settings.memory_fraction / (2 if settings.together else 1),
        engine_args=settings.engine_args,
    )


def _together(benchmark: Benchmark, cells: list[Cell], progress: Progress) -> None:
    """Load both, then measure them in turn within each grid point."""
    with contextlib.ExitStack() as stack:
        engines = []
        for number in (0, 1):
            engine = _load(benchmark, number, cells, progress)
            engines.append(stack.enter_context(engine))
        for cell in _fitting(benchmark, cells):
            progress(f"context {cell.context:,}, batch {cell.batch}")
            with _skipping(benchmark, cell):
                for engine in engines:
                    _warm_up(engine, cell, benchmark.grid)
                for index in range(benchmark.grid.rounds):
                    for number in _order(index):
                        _measure(engines[number], benchmark, number, cell, index)


def _in_turn(benchmark: Benchmark, cells: list[Cell], progress: Progress) -> None:
    """Load one after the other, in each round anew."""
    for index in range(benchmark.grid.rounds):
        for number in _order(index):
            with _load(benchmark, number, cells, progress) as engine:
                for cell in _fitting(benchmark, cells):
                    progress(f"context {cell.context:,}, batch {cell.batch}")
                    with _skipping(benchmark, cell):
                        _warm_up(engine, cell, benchmark.grid)
                        _measure(engine, benchmark, number, cell, index)


def _order(index: int) -> tuple[int, int]:
    """Return base first or last by turns: what drifts evenly is shared out evenly."""
    return (0, 1) if index % 2 == 0 else (1, 0)


def _load(
    benchmark: Benchmark, number: int, cells: list[Cell], progress: Progress
) -> Engine:
    progress(f"loading {benchmark.models[number].name} in {benchmark.settings.engine}")
    job = _job(benchmark, number, cells)
    engine = Engine(job, show_log=benchmark.settings.show_log)
    benchmark.loaded[number] = engine.loaded
    return engine


def _fitting(benchmark: Benchmark, cells: list[Cell]) -> Iterator[Cell]:
    """Yield what can be measured by what is known now, note why the rest cannot."""
    for cell in cells:
        if cell in benchmark.skipped:
            continue
        reason = reason_to_skip(cell, benchmark)
        if reason is None:
            yield cell
        else:
            benchmark.skip(cell, reason)


@contextlib.contextmanager
def _skipping(benchmark: Benchmark, cell: Cell) -> Iterator[None]:
    """Leave a grid point out that an engine cannot do."""
    try:
        yield
    except EngineError as err:
        benchmark.skip(cell, str(err))


def _warm_up(engine: Engine, cell: Cell, grid: Grid) -> None:
    engine.measure(
        batch=cell.batch,
        context=cell.context,
        generate=min(_WARM_UP_TOKENS, grid.generate),
        seed=0,
    )


def _measure(
    engine: Engine, benchmark: Benchmark, number: int, cell: Cell, index: int
) -> None:
    timing = engine.measure(
        batch=cell.batch,
        context=cell.context,
        generate=benchmark.grid.generate,
        seed=index + 1,  # the same prompts for both, others in each round
    )
    benchmark.timings.setdefault(cell, ([], []))[number].append(timing)
