# SPDX-License-Identifier: Apache-2.0
"""Models are compared where they were measured alike, and nowhere else."""

from collections.abc import Iterable

import pytest

from nbl_modifier.records.measurements import Kind, Metric
from nbl_modifier.report.blocks import FigureItem, Item, Text
from nbl_modifier.report.collect import ModelGroup
from nbl_modifier.report.comparisons import quality, quality_against_speed, speed
from nbl_modifier.report.table import Table


def group(**models: dict[str, Metric]) -> ModelGroup:
    """Return models of one base model, which is the first."""
    name = next(iter(models))
    return ModelGroup(name, name, [], models, [], [])


def metrics(kind: Kind, **values: float) -> dict[str, Metric]:
    return {name: Metric(value, 0.03, kind) for name, value in values.items()}


def tables(items: Iterable[Item]) -> list[Table]:
    return [item for item in items if isinstance(item, Table)]


def test_a_model_without_a_metric_has_an_empty_cell() -> None:
    models = group(
        base=metrics("accuracy", piqa=0.8, arc=0.6),
        nbl=metrics("accuracy", piqa=0.7) | metrics("score", f1=0.5),
    )
    (table,) = tables(quality(models))
    assert table.header == ("model", "piqa", "arc", "f1")
    assert table.rows == [
        ("base", "0.8000 ± 0.0300", "0.6000 ± 0.0300", ""),
        ("nbl", "0.7000 ± 0.0300", "", "0.5000 ± 0.0300"),
    ]


def test_accuracy_is_over_the_tasks_that_all_have() -> None:
    """Of two points, their errors pooled: sqrt(2) * 0.03 / 2."""
    fast = metrics("speed_ratio", **{"decode, 1 x 8 tokens, vllm": 2.0})
    models = group(
        base=metrics("accuracy", piqa=0.8, arc=0.6, boolq=0.1)
        | metrics("speed_ratio", **{"decode, 1 x 8 tokens, vllm": 1.0}),
        nbl=metrics("accuracy", piqa=0.7, arc=0.5) | fast,
        slow=metrics("accuracy", piqa=0.1),
    )
    items = list(quality_against_speed(models))
    (table,) = tables(items)
    assert table.header[1:] == (
        "tokens/s, times base: decode, 1 x 8 tokens, vllm",
        "mean accuracy over 2 tasks",
    )
    assert table.rows == [
        ("base", "1.0000 ± 0.0300", "0.7000 ± 0.0212"),
        ("nbl", "2.0000 ± 0.0300", "0.6000 ± 0.0212"),
    ]
    assert sum(isinstance(item, FigureItem) for item in items) == 1


def test_grid_point_is_the_one_that_most_models_have() -> None:
    both, one = "decode, 1 x 8 tokens, vllm", "decode, 1 x 16 tokens, vllm"
    own = metrics("accuracy", piqa=0.5)
    models = group(
        base=own | metrics("speed_ratio", **{both: 1.0, one: 1.0}),
        a=own | metrics("speed_ratio", **{both: 2.0}),
    )
    (table,) = tables(quality_against_speed(models))
    assert table.header[1].endswith(both)
    assert [row[0] for row in table.rows] == ["base", "a"]


def test_speed_has_a_column_for_each_compressed_model() -> None:
    point = "prefill, 1 x 8 tokens, vllm"
    models = group(
        base=metrics("speed_ratio", **{point: 1.0}),
        a=metrics("speed_ratio", **{point: 1.5}),
        unmeasured={},
    )
    (table,) = tables(speed(models))
    assert table.header == ("tokens/s, times base", "a")
    assert table.rows == [(point, "1.5000 ± 0.0300")]


@pytest.mark.parametrize("section", [quality, speed, quality_against_speed])
def test_nothing_measured_is_said(section: object) -> None:
    (item,) = section(group(base={}))  # type: ignore[operator]
    assert isinstance(item, Text)
    assert item.is_absence
