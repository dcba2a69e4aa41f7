# SPDX-License-Identifier: Apache-2.0
"""The measurements of benchmarks/selection_study.py: their file and their tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.selection_settings import NAMED, PAPER, Setting


@dataclass(frozen=True)
class Row:
    """
    One measurement.

    :param model: name of the model's folder
    :param seed: of the calibration text
    :param num_windows: calibration windows, held-out ones included
    :param setting: how layers were chosen and fitted
    :param num_layers: how many
    :param layers: which
    :param perplexity: on the test windows
    :param base: of the model before, on the same
    :param error: standard error of their ratio over windows, compared in pairs
    :param text: of the test windows; empty: Python's own documentation
    """

    model: str
    seed: int
    num_windows: int
    setting: Setting
    num_layers: int
    layers: tuple[int, ...]
    perplexity: float
    base: float
    error: float
    text: str = ""


class Store:
    """The measurements so far, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            for entry in json.loads(path.read_text(encoding="utf-8")):
                entry["setting"] = Setting(**entry["setting"])
                entry["layers"] = tuple(entry["layers"])
                self.rows.append(Row(**entry))

    def of(self, case: tuple[str, int, int]) -> list[Row]:
        """Return those of a model, a seed and a number of windows."""
        return [r for r in self.rows if (r.model, r.seed, r.num_windows) == case]

    def lacks(self, case: tuple[str, int, int], setting: Setting, m: int) -> bool:
        """Return whether a measurement is still to be made."""
        made = ((row.setting, row.num_layers) for row in self.of(case))
        return (setting, m) not in made

    def add(self, rows: Iterable[Row]) -> None:
        """Keep measurements."""
        self.rows += rows
        entries = [asdict(row) for row in self.rows]
        self._path.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def mean_and_error(values: Sequence[float]) -> str:
    """Return mean and standard error over seeds as text."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


class Tables:
    """
    The study as Markdown.

    :param rows: of one model
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._usual = max((row.num_windows for row in rows), default=0)

    def _ratios(
        self, setting: Setting, m: int, num_windows: int | None = None
    ) -> list[float]:
        """Return perplexity over the base model's, one for each seed, in order."""
        windows = num_windows or self._usual
        found = [
            (row.seed, row.perplexity / row.base)
            for row in self._rows
            if (row.setting, row.num_layers, row.num_windows) == (setting, m, windows)
        ]
        return [ratio for _, ratio in sorted(found)]

    def main(self, settings: Sequence[Setting], layers: Sequence[int]) -> str:
        """Return perplexity over the base model's by setting and number of layers."""
        every = ("method", "selection", "refit", "epochs", "input")
        varied = [f for f in every if len({getattr(s, f) for s in settings}) > 1]
        fields = ["criterion", *varied]
        rows = []
        for setting in settings:
            cells = [self._ratios(setting, m) for m in layers]
            if any(cells):
                names = [str(getattr(setting, field)) for field in fields]
                rows.append([*names, *(mean_and_error(cell) for cell in cells)])
        return table([*fields, *(f"m = {m}" for m in layers)], rows)

    def named(self, layers: Sequence[int]) -> str:
        """Return the same of methods that have a name."""
        rows = [
            [name, *(mean_and_error(self._ratios(setting, m)) for m in layers)]
            for name, setting in NAMED.items()
        ]
        return table(["method", *(f"m = {m}" for m in layers)], rows)

    def recovered(self, layers: Sequence[int]) -> str:
        """Return how much of what the paper's settings lose other ones keep."""
        rows = []
        for name in ("preset best", "preset best, in closed form"):
            row = [name]
            for m in layers:
                paper, kept = self._ratios(PAPER, m), self._ratios(NAMED[name], m)
                # of as many seeds, unless the study is not at its end
                pairs = zip(paper, kept, strict=True) if len(paper) == len(kept) else ()
                row.append(mean_and_error([(p - k) / (p - 1) for p, k in pairs]))
            rows.append(row)
        return table(["part kept", *(f"m = {m}" for m in layers)], rows)

    def over(
        self, name: str, values: Mapping[str, tuple[Setting, int | None]], m: int
    ) -> str:
        """Return the perplexity ratios of named variants at ``m`` layers."""
        rows = []
        for label, (setting, windows) in values.items():
            ratios = self._ratios(setting, m, windows)
            if ratios:
                rows.append([label, mean_and_error(ratios)])
        return table([name, f"m = {m}"], rows)
