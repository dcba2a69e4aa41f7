# SPDX-License-Identifier: Apache-2.0
"""
What a report says about one base model, section by section.

A section without data stays and says why, so that a reader never wonders whether
something was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nbl_modifier.criteria import CRITERIA
from nbl_modifier.records.compression import NBLReport

from .blocks import Code, FigureItem, Item, Section, Text
from .collect import Checkpoint, ModelGroup
from .comparisons import quality, quality_against_kv_cache, quality_against_speed, speed
from .escaping import code
from .kv_tables import kv_cache_section
from .methods_section import methods_section
from .plots import correlations_figure, quantile_of, ranking_figure
from .table import Table
from .tables import layers_table

__all__ = ["group_sections"]

_NO_CORRELATIONS = (
    "Not measured: they cost many times what the ranking does. `nbl rank "
    "--canonical-correlations` writes them, into a folder to name here, too."
)


def group_sections(group: ModelGroup) -> list[Section]:
    """
    Return everything there is to say about one base model.

    :param group: its reports and measurements
    """
    sections = {
        "Quality": quality(group),
        "Quality of methods": methods_section(group.methods),
        "Quality against speed": quality_against_speed(group),
        "Quality against KV cache": quality_against_kv_cache(group),
        "Speed": speed(group),
        "KV-cache size": kv_cache_section(group),
        "Checkpoints": _checkpoints(group),
        "Ranking": _per_checkpoint(group.checkpoints, _ranking),
        "Layers chosen by each criterion": _per_checkpoint(
            group.checkpoints, _criteria
        ),
        "Canonical correlations": _per_checkpoint(_correlated(group), _correlations),
        "How it was made": _per_checkpoint(group.checkpoints, _provenance),
    }
    return [Section(title, list(items)) for title, items in sections.items()]


def _checkpoints(group: ModelGroup) -> Iterator[Item]:
    if not group.checkpoints:
        yield Text(
            f"No `nbl_report.json` of a model made from {code(group.model)} was found.",
            is_absence=True,
        )
        return
    rows = []
    for checkpoint in group.checkpoints:
        report = checkpoint.report
        rows.append(
            (
                checkpoint.name,
                f"{report.num_replaced} of {report.num_hidden_layers}",
                ", ".join(map(str, report.selected_layers)),
                _method(report),
                report.input,
                f"{report.kv_cache_fraction:.1%}",
                f"{report.num_tokens:,}",
                f"{report.calibration_seconds:.1f}",
            )
        )
    header = (
        *("checkpoint", "replaced", "layers", "criterion", "input"),
        *("KV cache", "calibration tokens", "seconds"),
    )
    yield Table(header, rows)


def _method(report: NBLReport) -> str:
    """Return how layers were chosen and fitted, where not as in the paper."""
    words = [report.criterion]
    words += [report.selection] if report.selection != "one_shot" else []
    words += ["refit"] if report.refit else []
    words += ["distilled"] if report.distill_epochs else []
    return ", ".join(words)


def _per_checkpoint(
    checkpoints: Sequence[Checkpoint], section: Callable[[Checkpoint], Iterator[Item]]
) -> Iterator[Item]:
    """
    Yield a section's items for each checkpoint, introduced by its name.

    Checkpoints of one calibration, quantized in several ways, say the same.
    """
    if not checkpoints:
        yield Text("No report to take this from.", is_absence=True)
    said: dict[str, list[Item]] = {}
    for checkpoint in checkpoints:
        items = list(section(checkpoint))
        words: list[Item] = [item for item in items if not isinstance(item, FigureItem)]
        same = next((name for name, other in said.items() if other == words), None)
        said.setdefault(checkpoint.name, words)
        if same is not None:
            yield Text(f"{code(checkpoint.name)}: the same as {code(same)}.")
            continue
        if len(checkpoints) > 1:
            yield Text(f"{code(checkpoint.name)}:")
        yield from items


def _ranking(checkpoint: Checkpoint) -> Iterator[Item]:
    report = checkpoint.report
    yield FigureItem(
        lambda: ranking_figure(report),
        f"Bound and NMSE of every measured layer; numbers above the bars are places in "
        f"the ranking by {report.criterion}.",
    )
    yield layers_table(report, fine=True)


def _criteria(checkpoint: Checkpoint) -> Iterator[Item]:
    report = checkpoint.report
    replaced = {layer.index for layer in report.layers if layer.selected}
    rows: list[tuple[str, ...]] = []
    marked: set[int] = set()
    for name, criterion in CRITERIA.items():
        found = {layer.index: criterion.of(layer) for layer in report.layers}
        scores = {i: score for i, score in found.items() if score is not None}
        if len(scores) < len(found):
            continue
        order = sorted(scores, key=lambda index: (scores[index], index))
        first = sorted(order[: len(replaced)])
        if name == report.criterion:
            marked.add(len(rows))
        rows.append(
            (
                name,
                ", ".join(map(str, first)),
                f"{len(replaced & set(first))} of {len(replaced)}",
                ", ".join(map(str, order)),
            )
        )
    yield Table(
        ("criterion", "first in its order", "also replaced", "order of all layers"),
        rows,
        frozenset(marked),
        is_detail=True,
    )
    if len(report.layers) == len(replaced):
        yield Text("Only the replaced layers were measured, so every order has them.")


def _correlated(group: ModelGroup) -> list[Checkpoint]:
    """Return what has correlations, or all checkpoints, to say why they have none."""
    found = [
        each
        for each in (*group.rankings, *group.checkpoints)
        if any(layer.canonical_correlations for layer in each.report.layers)
    ]
    return found or group.checkpoints


def _correlations(checkpoint: Checkpoint) -> Iterator[Item]:
    report = checkpoint.report
    layers = [
        layer for layer in report.ranking if layer.canonical_correlations is not None
    ]
    if not layers:
        yield Text(_NO_CORRELATIONS, is_absence=True)
        return
    yield FigureItem(
        lambda: correlations_figure(report),
        "1 − ρ² over the canonical directions of each layer: from the least to the "
        "greatest, the middle half thick, the median as a dot. Their sum is the bound. "
        "Drawn down to 10⁻⁶.",
    )
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
    rows = []
    for layer in sorted(layers, key=lambda layer: layer.index):
        quantiles = layer.canonical_correlations or []
        values = [quantile_of(quantiles, share) for share in shares]
        rows.append((str(layer.index), *(f"{value:.5f}" for value in values)))
    between = (f"{share:.0%} below" for share in shares[1:-1])
    header = ("layer", "least ρ", *between, "greatest ρ")
    yield Table(header, rows, is_detail=True)


def _provenance(checkpoint: Checkpoint) -> Iterator[Item]:
    report = checkpoint.report
    versions = ", ".join(f"{name} {v}" for name, v in report.versions.items())
    yield Text(
        f"{report.num_calibration_samples:,} calibration sequences, "
        f"{report.num_tokens:,} tokens; {versions}; {report.created}."
    )
    if report.recipe:
        yield Code(report.recipe.strip())
