# SPDX-License-Identifier: Apache-2.0
"""From timings to the report, the roofline's prediction beside each."""

from __future__ import annotations

from dataclasses import asdict

from nbl_modifier.records.provenance import collect_versions, utc_timestamp
from nbl_modifier.records.speed import (
    FORMAT_VERSION,
    Capacity,
    MeasuredModel,
    SkippedCell,
    SpeedReport,
    SpeedRow,
)

from .limits import largest_batch, predicted_seconds
from .plan import Benchmark, Cell
from .roofline import Machine

__all__ = ["make_report"]

_BOTH = (0, 1)


def make_report(benchmark: Benchmark) -> SpeedReport:
    """
    Return the report of a finished benchmark.

    :param benchmark: every cell measured in every round, or skipped
    """
    grid, settings = benchmark.grid, benchmark.settings
    base = benchmark.loaded[0]
    # A peak is the best that was ever seen: other work can only slow it down.
    peaks = [benchmark.loaded[number].peaks for number in _BOTH]
    machine = Machine(
        max(each.flops_per_second for each in peaks),
        max(each.bytes_per_second for each in peaks),
    )
    rows = [
        row for cell in benchmark.timings for row in _rows(cell, benchmark, machine)
    ]
    base_model, compressed_model = (_model(benchmark, number) for number in _BOTH)
    return SpeedReport(
        format_version=FORMAT_VERSION,
        engine=settings.engine,
        base=base_model,
        compressed=compressed_model,
        capacity=_capacity(benchmark),
        rows=sorted(rows, key=lambda row: row.phase, reverse=True),
        skipped=[
            SkippedCell(cell.context, cell.batch, reason)
            for cell, reason in benchmark.skipped.items()
        ],
        settings={
            "dtype": benchmark.models[0].dtype,
            "rounds": grid.rounds,
            "generate_tokens": grid.generate,
            "tokens_per_pass": base.tokens_per_pass,
            **{
                name: value
                for name, value in asdict(settings).items()
                if name not in ("engine", "show_log")
            },
        },
        machine={"device": base.device, "threads": base.threads, **asdict(machine)},
        versions=collect_versions(),
        created=utc_timestamp(),
    )


def _rows(cell: Cell, benchmark: Benchmark, machine: Machine) -> list[SpeedRow]:
    """Return the cell's two phases."""
    timings, prompt_tokens = benchmark.timings[cell], cell.batch * cell.context
    predicted = [
        predicted_seconds(
            cell, benchmark, number, machine, timings[number][-1].cache_tokens
        )
        for number in _BOTH
    ]
    reading = [
        [prompt_tokens / timing.prefill_seconds for timing in timings[number]]
        for number in _BOTH
    ]
    generating = [
        [cell.batch * t.decode_steps / t.decode_seconds for t in timings[number]]
        for number in _BOTH
    ]
    return [
        SpeedRow(
            phase="prefill",
            context=cell.context,
            batch=cell.batch,
            generated=0,
            base=reading[0],
            compressed=reading[1],
            predicted_base=prompt_tokens / predicted[0][0],
            predicted_compressed=prompt_tokens / predicted[1][0],
        ),
        SpeedRow(
            phase="decode",
            context=cell.context,
            batch=cell.batch,
            generated=timings[0][-1].decode_steps,
            base=generating[0],
            compressed=generating[1],
            predicted_base=cell.batch / predicted[0][1],
            predicted_compressed=cell.batch / predicted[1][1],
        ),
    ]


def _model(benchmark: Benchmark, number: int) -> MeasuredModel:
    model, loaded = benchmark.models[number], benchmark.loaded[number]
    measured = [
        timing.cache_bytes
        for timings in benchmark.timings.values()
        for timing in timings[number]
    ]
    return MeasuredModel(
        name=model.name,
        architecture=loaded.architecture,
        num_layers=model.num_layers,
        linearized=list(model.linearized),
        weight_bytes=model.shape.weight_bytes,
        kv_bytes_per_token=model.shape.cache_bytes(1),
        measured_kv_bytes_per_token=measured[0] if measured else None,
        load_seconds=loaded.load_seconds,
    )


def _capacity(benchmark: Benchmark) -> Capacity:
    base, compressed = (model.shape.cache_bytes(1) for model in benchmark.models)
    batches = {}
    for context in benchmark.grid.contexts:
        length = context + benchmark.grid.generate
        pair = [largest_batch(benchmark, number, length) for number in _BOTH]
        if length <= benchmark.models[0].max_context:
            batches[str(context)] = [value for value in pair if value is not None]
    return Capacity(
        base_tokens=benchmark.loaded[0].kv_cache_tokens,
        compressed_tokens=benchmark.loaded[1].kv_cache_tokens,
        predicted_ratio=base / compressed if compressed else None,
        largest_batch={context: pair for context, pair in batches.items() if pair},
    )
