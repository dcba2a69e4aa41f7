# SPDX-License-Identifier: Apache-2.0
"""Quality and speed of the models of a group, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from nbl_modifier.records.measurements import KINDS, Metric, mean_accuracy

from .blocks import FigureItem, Item, Text
from .collect import ModelGroup
from .plots import Point, scatter_figure
from .table import Table

__all__ = ["quality", "quality_against_kv_cache", "quality_against_speed", "speed"]

# A number and its standard error, if that is known.
Value = tuple[float, float | None]

_NO_BENCHMARK = "No speed was measured: there is no `nbl_benchmark.json`."


def quality(group: ModelGroup) -> Iterator[Item]:
    """
    Yield every measured quality, one model per row.

    :param group: the models
    """
    kinds = {
        name: metric.kind
        for metrics in group.models.values()
        for name, metric in metrics.items()
        if metric.kind != "speed_ratio"
    }
    if not kinds:
        yield Text(
            "No quality was measured. `nbl compress --heldout` measures perplexity, "
            "`nbl evaluate` tasks.",
            is_absence=True,
        )
        return
    rows = [
        (model, *(_cell(metrics.get(name)) for name in kinds))
        for model, metrics in group.models.items()
    ]
    yield Table(("model", *kinds), rows)
    units = "; ".join(
        f"{', '.join(name for name in kinds if kinds[name] == kind)}: {KINDS[kind]}"
        for kind in dict.fromkeys(kinds.values())
    )
    yield Text(f"{units}. ± is one standard error.")


def speed(group: ModelGroup) -> Iterator[Item]:
    """
    Yield every measured speed, one model per column.

    :param group: the models
    """
    models = {
        model: {n: m for n, m in metrics.items() if m.kind == "speed_ratio"}
        for model, metrics in group.models.items()
        if model != group.name
    }
    models = {model: metrics for model, metrics in models.items() if metrics}
    if not models:
        yield Text(_NO_BENCHMARK, is_absence=True)
        return
    names = dict.fromkeys(name for metrics in models.values() for name in metrics)
    rows = [
        (name, *(_cell(metrics.get(name)) for metrics in models.values()))
        for name in names
    ]
    yield Table(("tokens/s, times base", *models), rows)
    yield Text("± is one standard error over rounds that measure both models in turn.")


def quality_against_kv_cache(group: ModelGroup) -> Iterator[Item]:
    """
    Yield quality over what is left of the KV cache; arXiv:2505.21077, Figure 6.

    :param group: the models
    """
    fractions: dict[str, Value] = {group.name: (1.0, None)}
    for checkpoint in group.checkpoints:
        fractions[checkpoint.name] = (checkpoint.report.kv_cache_fraction, None)
    yield from _scatter(group, fractions, "KV cache, times base")


def quality_against_speed(group: ModelGroup) -> Iterator[Item]:
    """
    Yield quality over speed, for each phase; arXiv:2505.21077, Figure 2.

    :param group: the models
    """
    names = [
        name
        for metrics in group.models.values()
        for name, metric in metrics.items()
        if metric.kind == "speed_ratio"
    ]
    if not names:
        yield Text(_NO_BENCHMARK, is_absence=True)
        return
    for phase in dict.fromkeys(name.partition(",")[0] for name in names):
        own = [name for name in names if name.partition(",")[0] == phase]
        # the grid point that most models have; the last, and largest, of equals
        shared = max(reversed(dict.fromkeys(own)), key=own.count)
        speeds = {
            model: (metrics[shared].value, metrics[shared].standard_error)
            for model, metrics in group.models.items()
            if shared in metrics
        }
        yield from _scatter(group, speeds, f"tokens/s, times base: {shared}")


def _scatter(
    group: ModelGroup, horizontal: Mapping[str, Value], x_label: str
) -> Iterator[Item]:
    """Yield each quality over ``horizontal``, of the models that have both."""
    models = {name: own for name, own in group.models.items() if name in horizontal}
    qualities = _shared_qualities(models)
    if not qualities:
        yield Text(
            f"{x_label}: no quality was measured on two models or more of which it is "
            "known.",
            is_absence=True,
        )
    for y_label, vertical in qualities.items():
        points = [
            Point(
                label=model,
                x=horizontal[model],
                y=(metric.value, metric.standard_error),
                is_base=model == group.name,
            )
            for model, metric in vertical.items()
        ]
        yield FigureItem(
            partial(scatter_figure, points, x_label, y_label),
            "Bars are one standard error, where one is known.",
        )
        rows = [
            (model, _number(*horizontal[model]), _cell(metric))
            for model, metric in vertical.items()
        ]
        yield Table(("model", x_label, y_label), rows)


def _shared_qualities(
    models: Mapping[str, dict[str, Metric]],
) -> dict[str, dict[str, Metric]]:
    """
    Return the qualities that at least two models have, by what they are.

    Accuracy is the mean over the tasks that all models with accuracies have.
    """
    qualities = {}
    for kind in ("accuracy", "perplexity_ratio", "bits_per_byte"):
        having = {
            model: {name: m for name, m in metrics.items() if m.kind == kind}
            for model, metrics in models.items()
        }
        having = {model: metrics for model, metrics in having.items() if metrics}
        if len(having) < 2:
            continue
        shared = sorted(set.intersection(*map(set, having.values())))
        if kind == "accuracy" and len(shared) > 1:
            qualities[f"mean accuracy over {len(shared)} tasks"] = {
                model: mean_accuracy({name: metrics[name] for name in shared})
                for model, metrics in having.items()
            }
        elif shared:
            name = shared[0]
            words = f"accuracy, {name}" if kind == "accuracy" else name
            qualities[words] = {
                model: metrics[name] for model, metrics in having.items()
            }
    return qualities


def _cell(metric: Metric | None) -> str:
    return "" if metric is None else _number(metric.value, metric.standard_error)


def _number(value: float, error: float | None) -> str:
    return f"{value:.4f} ± {error:.4f}" if error else f"{value:.4f}"
