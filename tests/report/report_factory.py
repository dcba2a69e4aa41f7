# SPDX-License-Identifier: Apache-2.0
"""A report as a run would make it, for the tests of this folder."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from nbl_modifier.records.compression import FORMAT_VERSION, LayerResult, NBLReport
from nbl_modifier.records.methods import MethodRow, MethodsTable, TextResult
from nbl_modifier.records.speed import Capacity, MeasuredModel, SpeedReport, SpeedRow

MODEL = "some-organization/some-model"
BEST, REFERENCE = "best $x$", "ref"
# Layer number to bound: the ranking is 2, 0, 3, 1.
BOUNDS = {0: 2.5, 1: 9.0, 2: 1.25, 3: 4.0}
SELECTED = [0, 2]


def make_report(**changes: object) -> NBLReport:
    """Return a finished run on 4 layers with 2 replaced; ``changes`` are fields."""
    order = sorted(BOUNDS, key=BOUNDS.__getitem__)
    layers = [
        LayerResult(
            name=f"model.layers.{index}.self_attn",
            index=index,
            num_tokens=4096,
            nmse=bound / 10,
            residual_nmse=bound / 100,
            cca_bound=bound,
            dampening_frac=1e-6,
            score=bound,
            rank=order.index(index) + 1,
            selected=index in SELECTED,
            reason="test",
            seconds=0.5,
        )
        for index, bound in BOUNDS.items()
    ]
    fields = {
        "format_version": FORMAT_VERSION,
        "model": MODEL,
        "model_type": "llama",
        "num_hidden_layers": 4,
        "criterion": "cca_bound",
        "input": "residual",
        "selected_layers": SELECTED,
        "layers": layers,
        "num_calibration_samples": 16,
        "num_tokens": 4096,
        "calibration_seconds": 3.0,
        "dampening_frac": 0.0,
        "recipe": "default_stage:\n  default_modifiers: {NBLModifier: {num_layers: 2}}",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "created": "2026-01-02T03:04:05+00:00",
        "evaluation": {"perplexity base": 14.5, "held-out tokens": 16320.0},
    }
    return NBLReport(**{**fields, **changes})  # type: ignore[arg-type]


def method_row(method: str, m: int, ratio: float, **changes: object) -> MethodRow:
    """Return a method at ``m`` of 8 layers; perplexity is ``ratio`` times 20."""
    text = TextResult((20 * ratio, 0.5), (ratio, 0.01), (ratio / 1.1, 0.02), (0.5, 0.1))
    fields = {
        "method": method,
        "m": m,
        "layers": list(range(m)),
        "num_parameters": 1_000_000,
        "kv_cache": (8 - m) / 8,
        "texts": {"c4": text},
        "tasks": {"piqa": (0.5, 0.02), "boolq": (0.75, 0.01)},
        "average": (0.6 / ratio, 0.011),
    }
    return MethodRow(**{**fields, **changes})  # type: ignore[arg-type]


def make_table(**changes: object) -> MethodsTable:
    """Return two methods beside a base model; ``changes`` are fields."""
    rows = [
        method_row("base", 0, 1.0),
        *(method_row(BEST, m, 1 + m / 20) for m in (2, 4)),
        *(method_row(REFERENCE, m, 1 + m / 10, facts=(7, 9)) for m in (2, 4)),
    ]
    fields = {
        "model": MODEL,
        "num_layers": 8,
        "reference": REFERENCE,
        "best": BEST,
        "calibrated_on": "much text",
        "measured_on": "other text",
        "rows": rows,
        "versions": {"torch": "1"},
        "created": "2026-01-02T03:04:05+00:00",
    }
    return MethodsTable(**{**fields, **changes})  # type: ignore[arg-type]


def write_checkpoint(
    directory: Path, selected: Sequence[int], **changes: object
) -> None:
    """Write the report and configuration of a checkpoint, without weights."""
    directory.mkdir(parents=True)
    report = make_report(selected_layers=list(selected), **changes)
    layers = [
        dataclasses.replace(layer, selected=layer.index in selected)
        for layer in report.layers
    ]
    dataclasses.replace(report, layers=layers).save(directory / "nbl_report.json")
    config = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_size": 256,
        "dtype": "bfloat16",
        "max_position_embeddings": 1024,
        "nbl_config": {"version": 1, "layers": {str(i): {} for i in selected}},
    }
    (directory / "config.json").write_text(json.dumps(config))


def write_measurements(path: Path, accuracies: dict[str, dict[str, float]]) -> None:
    """Write accuracies by model and task, the base model first; errors are 0.01."""
    base = next(iter(accuracies))
    measurements = [
        {
            "model": model,
            "baseline": None if model == base else base,
            "metrics": {
                name: {"value": value, "standard_error": 0.01, "kind": "accuracy"}
                for name, value in tasks.items()
            },
        }
        for model, tasks in accuracies.items()
    ]
    content = {"format_version": 1, "measurements": measurements}
    path.write_text(json.dumps(content))


def write_benchmark(path: Path, base: str, compressed: str) -> None:
    """Write the speeds of one pair of models: 1.25 +- 0.05 and 2 times base."""
    models = [
        MeasuredModel(name, "A", 4, [], 1e6, 512.0, None, 1.0)
        for name in (base, compressed)
    ]
    rows = [
        SpeedRow("prefill", 512, 8, 0, [100.0, 200.0], [120.0, 260.0], 1.0, 1.0),
        SpeedRow("decode", 512, 8, 64, [100.0, 200.0], [200.0, 400.0], 1.0, 1.0),
    ]
    SpeedReport(
        format_version=1,
        engine="vllm",
        base=models[0],
        compressed=models[1],
        capacity=Capacity(None, None, None, {}),
        rows=rows,
        skipped=[],
        settings={},
        machine={},
        versions={},
        created="2026-01-02T03:04:05+00:00",
    ).save(path)
