# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks/paper_table.py, made of its files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import BASE, BEST, PAPER
from benchmarks.paper_results import Cell, Results
from nbl_modifier.evaluation import PerplexityResult, Score, TaskScores
from nbl_modifier.evaluation.scores import pooled, ratio_score, stderr_of_sum
from nbl_modifier.records.files import write_atomically
from nbl_modifier.records.measurements import benchmark_measurements
from nbl_modifier.records.methods import (
    METHODS_FILE_NAME,
    MethodRow,
    MethodsTable,
    TextResult,
    Value,
)
from nbl_modifier.records.provenance import collect_versions, utc_timestamp
from nbl_modifier.records.speed import SPEED_FILE_NAME
from nbl_modifier.report.blocks import Section
from nbl_modifier.report.methods_section import CAPTIONS, drawings, methods_section
from nbl_modifier.report.page import render_markdown


def table_of(results: Results, order: tuple[str, ...]) -> MethodsTable:
    """
    Return everything there is so far.

    :param results: the files
    :param order: of the methods
    """
    settings = results.settings()
    cells = {(cell.method, cell.m): cell for cell in results.cells()}
    measured = {key: Measured.load(results, cell) for key, cell in cells.items()}
    methods = [BASE, *order]
    # Averages are of what is there: a long task may be left for later.
    tasks = [t for t in settings.tasks if any(t in m.tasks for m in measured.values())]
    rows = [
        _row(
            results.seconds(cells[key]),
            measured[key],
            measured.get((BASE, 0)),
            measured.get((PAPER, key[1])),
            measured.get((BEST, key[1])),
            tasks,
        )
        for key in sorted(cells, key=lambda key: (key[1], methods.index(key[0])))
    ]
    limit = "all" if settings.tasks_limit is None else f"{settings.tasks_limit:,}"
    return MethodsTable(
        model=settings.model,
        num_layers=settings.num_layers,
        reference=PAPER,
        best=BEST,
        calibrated_on=f"{settings.samples} x {settings.seq_len} tokens of "
        f"{settings.calibration}",
        measured_on=f"{settings.heldout_windows} windows of {settings.seq_len} tokens "
        f"of each text; {limit} documents of each task ({', '.join(tasks) or 'none'}), "
        f"MMLU with {settings.mmlu_shots} shots; {settings.dtype}",
        rows=rows,
        versions=collect_versions(),
        created=utc_timestamp(),
    )


@dataclass(frozen=True)
class Measured:
    """
    What was measured on one model so far.

    :param cell: how it was made
    :param texts: perplexity by text
    :param tasks: accuracy by task
    :param facts: by prompt, whether the completion is right
    :param speed: over the base model's, by what was timed
    """

    cell: dict[str, Any]
    texts: dict[str, Score]
    tasks: dict[str, Score]
    facts: dict[str, bool] | None
    speed: dict[str, Value]

    @classmethod
    def load(cls, results: Results, cell: Cell) -> Measured:
        """Return one model's."""
        settings = results.settings()
        texts = {t: results.read(cell, f"perplexity-{t}") for t in settings.texts}
        tasks = {t: results.read(cell, f"task-{t}") for t in settings.tasks}
        facts = results.read(cell, "facts")
        speed_file = results.directory(cell) / SPEED_FILE_NAME
        return cls(
            cell=results.read(cell),
            texts={
                name: ratio_score(
                    [-nll for nll in each["window_nlls"]],
                    each["window_tokens"],
                    "perplexity",
                    higher_is_better=False,
                )
                for name, each in texts.items()
                if each is not None
            },
            tasks={
                name: TaskScores.from_fields(each).score
                for name, each in tasks.items()
                if each is not None
            },
            facts=facts and {prompt: e["is_right"] for prompt, e in facts.items()},
            speed=_speeds(speed_file) if speed_file.exists() else {},
        )


def perplexity_fields(result: PerplexityResult) -> dict[str, Any]:
    """
    Return what a perplexity is made of, as JSON types.

    :param result: of one model on one text
    :raises ValueError: if it is not a number
    """
    if not math.isfinite(result.nll_mean):
        raise ValueError(f"perplexity: the loss is {result.nll_mean}.")
    return {
        "perplexity": result.perplexity,
        "window_nlls": list(result.window_nlls),
        "window_tokens": list(result.window_tokens),
    }


def _row(
    seconds: float,
    own: Measured,
    base: Measured | None,
    paper: Measured | None,
    best: Measured | None,
    tasks: list[str],
) -> MethodRow:
    return MethodRow(
        method=own.cell["method"],
        m=own.cell["m"],
        layers=own.cell["layers"],
        num_parameters=own.cell["num_parameters"],
        kv_cache=own.cell["kv_cache"],
        texts={name: _text_result(name, own, base, paper, best) for name in own.texts},
        tasks={
            name: (own.tasks[name].value, own.tasks[name].stderr)
            for name in tasks
            if name in own.tasks
        },
        average=_average(own, tasks),
        over_base=_difference(own, base, tasks),
        over_reference=_difference(own, paper, tasks),
        facts=_facts(own, base),
        speed=own.speed,
        seconds=seconds,
    )


def _facts(own: Measured, base: Measured | None) -> tuple[int, int] | None:
    """Return right completions, of those that the base model has right."""
    if own.facts is None or base is None or not any((base.facts or {}).values()):
        return None
    right = [prompt for prompt, is_right in (base.facts or {}).items() if is_right]
    return sum(own.facts[prompt] for prompt in right), len(right)


def _text_result(
    name: str,
    own: Measured,
    base: Measured | None,
    paper: Measured | None,
    best: Measured | None,
) -> TextResult:
    def other(measured: Measured | None) -> Score | None:
        return None if measured is None else measured.texts.get(name)

    score = own.texts[name]
    return TextResult(
        perplexity=(score.value, score.stderr),
        over_base=quotient(score, other(base)),
        over_best=quotient(score, other(best)),
        recovered=None
        if own in (base, paper)
        else recovered(score, other(base), other(paper)),
    )


def quotient(score: Score, other: Score | None) -> Value | None:
    """
    Return one perplexity over another's, with its standard error over windows.

    :param score: of one model
    :param other: of another on the same windows, or None
    """
    if other is None:
        return None
    ratio = score.value / other.value
    pairs = _pairs(score, other)
    return ratio, stderr_of_sum(
        [(own - ratio * theirs) / other.value for own, theirs in pairs]
    )


def recovered(score: Score, base: Score | None, paper: Score | None) -> Value | None:
    """
    Return the part of what ``paper`` loses that is not lost, with its standard error.

    :param score: perplexity of a model
    :param base: of the base model on the same windows
    :param paper: of the one that loses
    """
    if base is None or paper is None:
        return None
    lost = paper.value - base.value
    part = (paper.value - score.value) / lost
    return part, stderr_of_sum(
        [
            (p - own - part * (p - b)) / lost
            for (p, own), (_, b) in zip(
                _pairs(paper, score), _pairs(paper, base), strict=True
            )
        ]
    )


def _pairs(score: Score, other: Score) -> list[tuple[float, float]]:
    assert score.influence is not None, "of a ratio"
    assert other.influence is not None, "of a ratio"
    return list(zip(score.influence, other.influence, strict=True))


def _average(own: Measured, tasks: list[str]) -> Value | None:
    if not tasks or own.tasks.keys() < set(tasks):
        return None
    scores = [own.tasks[task] for task in tasks]
    mean = math.fsum(score.value for score in scores) / len(scores)
    return mean, pooled([score.stderr or 0.0 for score in scores])


def _difference(
    own: Measured, other: Measured | None, tasks: list[str]
) -> Value | None:
    """Return the difference of two averages, documents compared in pairs."""
    if other is None or other is own:
        return None
    ours, theirs = _average(own, tasks), _average(other, tasks)
    if ours is None or theirs is None:
        return None
    errors = [_paired_error(own.tasks[task], other.tasks[task]) for task in tasks]
    return ours[0] - theirs[0], pooled(errors)


def _paired_error(score: Score, other: Score) -> float:
    if score.influence is None or other.influence is None:
        return math.hypot(score.stderr or 0.0, other.stderr or 0.0)
    return stderr_of_sum([a - b for a, b in _pairs(score, other)]) or 0.0


def _speeds(path: Path) -> dict[str, Value]:
    compressed = benchmark_measurements(path)[-1].metrics
    return {n: (m.value, m.standard_error) for n, m in compressed.items()}


def save_table(results: Results, order: tuple[str, ...]) -> MethodsTable:
    """
    Write what ``nbl report`` reads, of everything there is so far.

    :param results: the files
    :param order: of the methods
    """
    table = table_of(results, order)
    table.save(results.folder / METHODS_FILE_NAME)
    return table


def render(table: MethodsTable, folder: Path) -> str:
    """
    Write ``table.md`` and the paper's figures 2, 4 and 6, and return the text.

    :param table: of one base model
    :param folder: for them
    :raises ImportError: if matplotlib is missing; the message says how to install it
    """
    images = []
    for number, draw in drawings(table).items():
        path = folder / f"figure{number}.png"
        draw().savefig(path, dpi=150, format="png")
        images.append(f"![{CAPTIONS[number]}]({path.name})")
    section = Section("Quality of methods", list(methods_section([table])))
    text = render_markdown(
        f"Methods on {Path(table.model).name}",
        [(Path(table.model).name, [section])],
        "\n\n".join([*images, f"Made by benchmarks/paper_table.py, {table.created}."]),
    )
    write_atomically(folder / "table.md", text)
    return text
