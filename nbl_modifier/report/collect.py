# SPDX-License-Identifier: Apache-2.0
"""The JSON files that ``nbl report`` is made of, grouped by base model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_modifier.records.compression import (
    RANKING_FILE_NAME,
    REPORT_FILE_NAME,
    NBLReport,
)
from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME
from nbl_modifier.records.measurements import (
    MEASUREMENTS_FILE_NAME,
    Measurement,
    Metric,
    benchmark_measurements,
    evaluation_measurements,
    load_measurements,
    report_measurements,
)
from nbl_modifier.records.methods import METHODS_FILE_NAME, MethodsTable
from nbl_modifier.records.speed import SPEED_FILE_NAME

__all__ = ["Checkpoint", "ModelGroup", "collect"]

_MEASUREMENT_READERS = {
    MEASUREMENTS_FILE_NAME: load_measurements,
    EVALUATION_FILE_NAME: evaluation_measurements,
    SPEED_FILE_NAME: benchmark_measurements,
}
_FILE_NAMES = (
    REPORT_FILE_NAME,
    METHODS_FILE_NAME,
    *_MEASUREMENT_READERS,
    RANKING_FILE_NAME,
)


@dataclass(frozen=True)
class Checkpoint:
    """
    One compressed model, or the base model where its layers were ranked only.

    :param name: distinct among those of its base model
    :param directory: where it lies
    :param report: what was measured and decided
    :param config: content of its ``config.json``, None without one
    """

    name: str
    directory: Path
    report: NBLReport
    config: dict[str, Any] | None


@dataclass(frozen=True)
class ModelGroup:
    """
    A base model and everything made of it.

    :param name: how the base model is called in tables and figures
    :param model: as the reports name it
    :param checkpoints: those with a report, fewest replaced layers first
    :param models: what was measured, by model name, the base model first; models
        without a report are among them
    :param methods: tables of compression methods on this base model
    :param rankings: of its layers, by ``nbl rank``
    """

    name: str
    model: str
    checkpoints: list[Checkpoint]
    models: dict[str, dict[str, Metric]]
    methods: list[MethodsTable]
    rankings: list[Checkpoint]


def collect(paths: Sequence[Path]) -> list[ModelGroup]:
    """
    Read all reports and measurements below ``paths``.

    A model's name that is an existing path stands for that path: ``out/nbl4`` in a
    file, and that directory found here, are one model if both are seen from the same
    place.

    :param paths: folders, searched with all their subfolders, or single files
    :return: one group per base model, in order of names
    :raises FileNotFoundError: if a path does not exist
    :raises ValueError: if there is no report in a path, a file cannot be read, or is
        older than the checkpoint it is about
    """
    files = {file.resolve(): file for path in paths for file in _files(path)}
    reports = _reports(files.values(), REPORT_FILE_NAME)
    rankings = _reports(files.values(), RANKING_FILE_NAME)
    tables = [
        MethodsTable.load(file)
        for file in files.values()
        if file.name == METHODS_FILE_NAME
    ]
    measurements = _measurements(files.values(), reports)
    metrics: dict[str, dict[str, Metric]] = {}
    for measurement in measurements:
        own = metrics.setdefault(_identity(measurement.model), {})
        own.update(measurement.metrics)
    names = [report.model for report in reversed(reports.values())]
    names += [each.baseline or each.model for each in measurements]
    names += [table.model for table in tables]
    names += [ranking.model for ranking in rankings.values()]
    # by identity of the base model, as it is called first
    bases = {_identity(name): name for name in reversed(names)}
    return [
        _group(
            key,
            bases[key],
            _made_from(key, reports, measurements),
            reports,
            metrics,
            [table for table in tables if _identity(table.model) == key],
            rankings,
        )
        for key in sorted(bases)
    ]


def _reports(files: Iterable[Path], name: str) -> dict[Path, NBLReport]:
    """Return the reports by directory, those of few replaced layers first."""
    reports = {file.parent: NBLReport.load(file) for file in files if file.name == name}
    order = sorted(reports, key=lambda path: (reports[path].num_replaced, str(path)))
    return {directory: reports[directory] for directory in order}


def _measurements(
    files: Iterable[Path], reports: Mapping[Path, NBLReport]
) -> list[Measurement]:
    """Return what the reports measured themselves, then what other files hold."""
    measurements: list[Measurement] = []
    for directory, report in reports.items():
        measurements += report_measurements(str(directory), report)
    created = {_identity(str(path)): report.created for path, report in reports.items()}
    for file in files:
        if file.name in _MEASUREMENT_READERS:
            found = _MEASUREMENT_READERS[file.name](file)
            _refuse_older(file, found, created)
            measurements += found
    return measurements


def _made_from(
    base: str, reports: Mapping[Path, NBLReport], measurements: Sequence[Measurement]
) -> list[str]:
    """Return the models, by identity, that were made from one base model."""
    made = [
        *((report.model, str(directory)) for directory, report in reports.items()),
        *((each.baseline, each.model) for each in measurements if each.baseline),
    ]
    own = (_identity(model) for origin, model in made if _identity(origin) == base)
    return list(dict.fromkeys(own))


def _refuse_older(
    file: Path, found: Sequence[Measurement], created: Mapping[str, str]
) -> None:
    """Refuse figures of a checkpoint that another one has been written over."""
    for measurement in found:
        made = created.get(_identity(measurement.model))
        if made and measurement.created and measurement.created < made:
            raise ValueError(
                f"{file}: measured at {measurement.created}, but {measurement.model} "
                f"was made at {made}, so these are figures of what was there before. "
                "Measure again, or remove the file."
            )


def _group(
    key: str,
    base: str,
    members: list[str],
    reports: dict[Path, NBLReport],
    metrics: dict[str, dict[str, Metric]],
    methods: list[MethodsTable],
    rankings: dict[Path, NBLReport],
) -> ModelGroup:
    names = _distinct_names([key, *members])
    checkpoints = [
        Checkpoint(
            names[_identity(str(directory))], directory, report, _config(directory)
        )
        for directory, report in reports.items()
        if _identity(report.model) == key
    ]
    return ModelGroup(
        name=names[key],
        model=base,
        checkpoints=checkpoints,
        models={names[each]: metrics.get(each, {}) for each in [key, *members]},
        methods=methods,
        rankings=[
            Checkpoint(f"ranking in {directory.name}", directory, report, None)
            for directory, report in rankings.items()
            if _identity(report.model) == key
        ],
    )


def _distinct_names(models: Sequence[str]) -> dict[str, str]:
    """Return the last part of each path or name, longer where that is not enough."""
    parts = {model: Path(model).parts for model in models}
    for depth in range(1, max(map(len, parts.values()))):
        names = {model: "/".join(own[-depth:]) for model, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {model: model for model in models}


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Check the path.")
    files = (
        [path]
        if path.is_file()
        else sorted(
            file
            for name in _FILE_NAMES
            for file in path.rglob(name)
            if not _is_hidden(file.relative_to(path))
        )
    )
    if not files or any(file.name not in _FILE_NAMES for file in files):
        raise ValueError(
            f"{path}: no report in it. A report is one of {', '.join(_FILE_NAMES)}; "
            "nbl compress writes the first beside the weights."
        )
    return files


def _is_hidden(file: Path) -> bool:
    """Return whether a folder above it is, such as that of a save that was killed."""
    return any(part.startswith(".") for part in file.parts)


def _identity(model: str) -> str:
    """Return one name for a model however its path was written."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _config(directory: Path) -> dict[str, Any] | None:
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as err:
        raise ValueError(f"{path}: not JSON ({err}). Restore the file.") from err
    return config
