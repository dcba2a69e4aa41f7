# SPDX-License-Identifier: Apache-2.0
"""README.md of a checkpoint: what it is, what was measured, how to load it."""

import json
import re
from pathlib import Path
from typing import Any

from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
from nbl_modifier.records.files import write_atomically

from .table import Table
from .tables import layers_table
from .templates import render

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(
    report: NBLReport, architecture_name: str, quantization: str | None
) -> str:
    """
    Return the text of README.md for the checkpoint that ``report`` describes.

    :param report: a finished run
    :param architecture_name: class in ``config.json``, such as ``NBLLlamaForCausalLM``
    :param quantization: what quantized the weights, such as
        ``compressed-tensors pack-quantized``, or None for a dense checkpoint
    :return: markdown with Hugging Face's YAML front matter
    """
    left = report.num_hidden_layers - report.num_replaced
    figures = report.evaluation or {}
    rows = [(name, _number(value)) for name, value in figures.items()]
    return render(
        "card.md",
        report=report,
        name=Path(report.model).name or "A local model",
        is_hub_model=_is_hub_model(report.model),
        architecture=architecture_name,
        needs_package=architecture_name.startswith("NBL"),
        quantization=quantization,
        action=report.outcome.split()[0],
        part="attention" if report.kind == "attention" else "the block",
        kept=left,
        kv_ratio=f"{1 / report.kv_cache_fraction:.3g} times" if left else "all",
        figures=Table(("figure", "value"), rows).to_markdown() if rows else "",
        ranking=layers_table(report).to_markdown(),
    )


def write_report(report: NBLReport, directory: Path) -> None:
    """
    Write ``nbl_report.json`` and the model card into a checkpoint.

    :param report: a finished run
    :param directory: the checkpoint, with its ``config.json``
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    report.save(directory / REPORT_FILE_NAME)
    card = model_card(report, config["architectures"][0], quantization_of(config))
    write_atomically(directory / "README.md", card)


def quantization_of(config: dict[str, Any]) -> str | None:
    """
    Return what quantized a checkpoint, in words, or None for a dense one.

    :param config: content of ``config.json``
    """
    entry = config.get("quantization_config")
    if not entry:
        return None
    words = [entry.get("quant_method"), entry.get("format")]
    return " ".join(word for word in words if word) or "unknown"


def _is_hub_model(model: str) -> bool:
    return bool(_REPOSITORY_ID.fullmatch(model)) and not Path(model).exists()


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
