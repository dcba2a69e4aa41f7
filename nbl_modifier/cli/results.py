# SPDX-License-Identifier: Apache-2.0
"""What ``nbl compress`` prints and writes once the checkpoint is saved."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbl_modifier.evaluation import PerplexityResult
    from nbl_modifier.records.compression import NBLReport
    from nbl_modifier.report.table import Table

PLOT_FILE_NAME = "nbl_ranking.png"


def update_report(
    output: str, model: str, figures: dict[str, PerplexityResult]
) -> NBLReport:
    """
    Add perplexities and sizes to the report beside the weights, and redo the card.

    :param output: checkpoint directory, with ``nbl_report.json``
    :param model: the base model
    :param figures: perplexities in order
    :return: the report as it is now
    """
    from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
    from nbl_modifier.records.measurements import (
        PERPLEXITY_RATIO,
        PERPLEXITY_RATIO_ERROR,
    )
    from nbl_modifier.report.model_card import write_report

    directory = Path(output)
    evaluation = {
        f"perplexity {name}": result.perplexity for name, result in figures.items()
    }
    if figures:
        base, *_, last = figures.values()
        ratio, error = last.relative_to(base)
        evaluation |= {PERPLEXITY_RATIO: ratio, PERPLEXITY_RATIO_ERROR: error}
        evaluation["held-out tokens"] = base.num_tokens
    evaluation["weights of the base model in bytes"] = weight_bytes(model)
    evaluation["weights in bytes"] = weight_bytes(output)
    report = dataclasses.replace(
        NBLReport.load(directory / REPORT_FILE_NAME),
        evaluation={k: float(v) for k, v in evaluation.items() if math.isfinite(v)},
    )
    write_report(report, directory)
    return report


def weight_bytes(model: str) -> int:
    """
    Return the size of the model's weight files on disk, in bytes.

    :param model: directory, or a Hugging Face name that is in the local cache
    """
    directory = Path(model)
    if not directory.is_dir():
        from transformers.utils import cached_file

        cached = cached_file(model, "config.json")
        if cached is None:  # cannot be: it was loaded a moment ago
            return 0
        directory = Path(cached).parent
    files = [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def print_results(
    output: str, model: str, has_nbl: bool, figures: dict[str, PerplexityResult]
) -> None:
    """
    Print what came out and how to serve it; finish report, model card and plot.

    :param output: checkpoint directory
    :param model: the base model
    :param has_nbl: whether there is a report
    :param figures: perplexities in order, may be empty
    """
    from nbl_modifier.report.tables import ranking_table

    print()
    report = update_report(output, model, figures) if has_nbl else None
    if report is not None:
        print(ranking_table(report), end="\n\n")
    if figures:
        print(perplexity_table(figures).to_text(), end="\n\n")
    base, now = weight_bytes(model), weight_bytes(output)
    print(f"weights on disk: {base / 1e6:,.2f} MB -> {now / 1e6:,.2f} MB")
    if report is not None:
        left = f"{report.kv_cache_fraction:.1%} of the base model's"
        print(f"{report.kv_cache_subject}: {left}")
        print(f"report: {output}/nbl_report.json, model card: {output}/README.md")
        write_plot(report, output)
    needs = "vLLM and nbl-modifier are" if _needs_package(output) else "vLLM is"
    print(f"\nserve it, where {needs} installed:")
    print(f"  vllm serve {output}")
    print("or try it there:")
    print(f"  nbl generate {model} {output} --prompt 'Hello'")


def _needs_package(output: str) -> bool:
    """Whether there are linearized layers; a model that is only shorter has none."""
    config = json.loads((Path(output) / "config.json").read_text(encoding="utf-8"))
    return "nbl_config" in config


def perplexity_table(figures: dict[str, PerplexityResult]) -> Table:
    """
    Return perplexities, each with its ratio to the first.

    The ratio's standard error is over windows, compared in pairs.

    :param figures: perplexities in order, the base model's first
    """
    from nbl_modifier.report.table import Table

    base = next(iter(figures.values()))
    rows = []
    for name, result in figures.items():
        ratio = (
            ""
            if result is base
            else "{:.4f} +- {:.4f}".format(*result.relative_to(base))
        )
        rows.append((name, f"{result.perplexity:,.3f}", ratio))
    first = f"perplexity on {base.num_tokens:,} held-out tokens"
    return Table((first, "", "times base"), rows)


def write_plot(report: NBLReport, output: str) -> None:
    """
    Write the figure of the ranking, or say why there is none.

    :param report: of one run
    :param output: folder
    """
    from nbl_modifier.report.plots import plot_ranking

    try:
        plot_ranking(report, Path(output) / PLOT_FILE_NAME)
    except ImportError as err:
        print(f"no plot: {err}")
    else:
        print(f"plot: {output}/{PLOT_FILE_NAME}")
