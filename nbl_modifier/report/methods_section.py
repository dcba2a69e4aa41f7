# SPDX-License-Identifier: Apache-2.0
"""A table of methods as a section of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from nbl_modifier.records.methods import MethodRow, MethodsTable, Value

from .blocks import FigureItem, Item, Text
from .method_plots import quality_over, quality_over_speed
from .table import Table

__all__ = ["CAPTIONS", "drawings", "methods_section"]

#: What the paper's figures show, by their numbers in arXiv:2505.21077.
CAPTIONS = {
    2: "Quality against speed, one line per method.",
    4: "Quality against the number of replaced layers. Bars are one standard error.",
    6: "Quality against the KV cache that is left. Bars are one standard error.",
}


def methods_section(tables: Sequence[MethodsTable]) -> Iterator[Item]:
    """
    Yield what each method keeps, as a table and as the paper's figures.

    :param tables: of one base model
    """
    if not tables:
        yield Text(
            "No table of methods was made. `benchmarks/paper_table.py` makes one.",
            is_absence=True,
        )
    for table in tables:
        yield Text(f"Calibrated on {table.calibrated_on}; {table.measured_on}.")
        yield _compared(table)
        yield Text(_legend(table))
        for number, draw in drawings(table).items():
            yield FigureItem(draw, CAPTIONS[number])
        yield _as_measured(table)
        yield _layers(table)


def drawings(table: MethodsTable) -> dict[int, partial]:
    """
    Return how to draw the paper's figures that there are numbers for, by their numbers.

    :param table: of one base model
    """
    drawn: dict[int, partial] = {}
    if not any(row.m and (row.average or row.texts) for row in table.rows):
        return drawn
    if any(row.speed for row in table.rows):
        drawn[2] = partial(quality_over_speed, table)
    return drawn | {
        4: partial(quality_over, table, "m"),
        6: partial(quality_over, table, "kv_cache"),
    }


def _compared(table: MethodsTable) -> Table:
    """Return the table of each row beside the base model and the other methods."""
    texts = list(dict.fromkeys(name for row in table.rows for name in row.texts))
    speeds = list(dict.fromkeys(name for row in table.rows for name in row.speed))
    header = ["m", "method"]
    for name in texts:
        header += [
            f"{name}, times base",
            f"{name}, times {table.best}",
            f"{name}, loss avoided",
        ]
    header += ["accuracy", f"accuracy, difference to {table.reference}"]
    header += ["facts", "KV cache"]
    header += ["parameters", *(f"{name}, times base" for name in speeds)]
    rows = []
    for row in table.rows:
        cells = [str(row.m or ""), row.method]
        for name in texts:
            cells += _cells_of_text(row, name)
        cells += [
            _cell(row.average),
            _cell(row.over_reference),
            "" if row.facts is None else f"{row.facts[0]} of {row.facts[1]}",
            f"{row.kv_cache:.1%}",
            f"{row.num_parameters:,}",
            *(_cell(row.speed.get(name)) for name in speeds),
        ]
        rows.append(tuple(cells))
    marked = {i for i, row in enumerate(table.rows) if row.method == table.best}
    used = [
        column
        for column in range(len(header))
        if column < 2 or any(row[column] for row in rows)
    ]
    return Table(
        tuple(header[column] for column in used),
        [tuple(row[column] for column in used) for row in rows],
        frozenset(marked),
    )


def _cells_of_text(row: MethodRow, name: str) -> tuple[str, str, str]:
    """Return the three cells of a text, empty where it was not measured."""
    if name not in row.texts:
        return "", "", ""
    text = row.texts[name]
    return _cell(text.over_base), _cell(text.over_best), _percent(text.recovered)


def _legend(table: MethodsTable) -> str:
    return (
        "± is one standard error, over windows of text for perplexities and over "
        "documents for accuracies; where two models are compared, in pairs. Perplexity "
        f"is given over the base model's and over that of {table.best} at the same m; "
        f"loss avoided is the part of what {table.reference} loses that the row does "
        "not lose. Accuracy is the mean over tasks, its error pooled over them. Facts: "
        "prompts that the base model completes right and the row still does. KV cache: "
        "bytes per token over the base model's."
    )


def _as_measured(table: MethodsTable) -> Table:
    """Return the table of perplexities and accuracies of each model by itself."""
    texts = list(dict.fromkeys(name for row in table.rows for name in row.texts))
    tasks = list(dict.fromkeys(name for row in table.rows for name in row.tasks))
    header = ("m", "method", *(f"{name}, perplexity" for name in texts), *tasks)
    rows = [
        (
            str(row.m or ""),
            row.method,
            *(
                _cell(row.texts[t].perplexity, 3) if t in row.texts else ""
                for t in texts
            ),
            *(_cell(row.tasks.get(task)) for task in tasks),
        )
        for row in table.rows
    ]
    return Table(header, rows, is_detail=True)


def _layers(table: MethodsTable) -> Table:
    """Return the table of which layers were chosen, and how long that took."""
    rows = [
        (
            str(row.m),
            row.method,
            " ".join(map(str, row.layers)),
            "" if row.seconds is None else f"{row.seconds:,.0f}",
        )
        for row in table.rows
        if row.m
    ]
    return Table(("m", "method", "layers", "seconds"), rows, is_detail=True)


def _cell(value: Value | None, digits: int = 4) -> str:
    if value is None:
        return ""
    number, error = value
    text = f"{number:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _percent(value: Value | None) -> str:
    if value is None:
        return ""
    number, error = value
    text = f"{100 * number:.1f}"
    return f"{text}%" if error is None else f"{text} ± {100 * error:.1f}%"
