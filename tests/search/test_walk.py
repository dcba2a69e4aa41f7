# SPDX-License-Identifier: Apache-2.0
"""Budgets and what ends a walk, through real oneshot() runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.records.compression import NBLReport
from tests.llmcompressor_plugin.test_modifier import activations
from tests.numerics import oracle
from tests.search.runs import FITTED, HELD_OUT, layer, run
from tests.tiny_llama import (
    DEMO_MODEL,
    compress,
    linearized,
    load,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_held_out_error_is_measured_on_other_windows(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    part = run(llama, rows.select(FITTED), num_layers=4)[1]
    fitted = activations(llama, rows.select(FITTED))
    heldout = activations(llama, rows.select(HELD_OUT))
    for result in everything.layers:
        same = layer(part, result.index)
        assert result.num_tokens == same.num_tokens == 12 * 64
        assert (result.nmse, result.cca_bound) == (same.nmse, same.cca_bound)
        assert same.heldout_nmse is None
        seen, other = fitted[result.index], heldout[result.index]
        W, b = oracle.lmmse(seen.residual, seen.output)
        expected = oracle.nmse(other.residual, other.output, W, b)
        # float64 throughout; 1e-9 leaves 1e-16 times the condition number of 1e3 room
        assert result.heldout_nmse == pytest.approx(expected, rel=1e-9)
        assert expected > result.nmse


def test_largest_error_that_may_be_used(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    errors = {r.index: r.heldout_nmse or math.nan for r in everything.layers}
    order = sorted(errors, key=errors.__getitem__)
    limit = errors[order[1]]  # exactly as large is allowed
    model, report = run(llama, rows, max_nmse=limit)
    assert linearized(model) == report.selected_layers == sorted(order[:2])
    assert report.binding == f"max_nmse={limit}"
    assert f"> max_nmse={limit}" in layer(report, order[2]).reason
    assert [result.index for result in report.ranking] == sorted(
        range(4), key=lambda index: layer(report, index).cca_bound
    )
    model, report = run(llama, rows, max_nmse=limit, num_layers=1)
    best = min(order[:2], key=lambda index: layer(report, index).cca_bound)
    assert linearized(model) == [best]
    assert report.binding == "num_layers=1"
    _, report = run(llama, rows, max_nmse=limit, kv_cache_reduction=0.75)
    assert report.num_replaced == 2
    assert report.binding == f"max_nmse={limit}"
    _, report = run(llama, rows, max_nmse=100.0)
    assert report.num_replaced == 4
    assert report.binding == "all 4 candidates"


def test_perplexity_may_rise_so_far(windows: Dataset) -> None:
    """Each prefix of the ranking is measured until one is too much."""
    fields: dict[str, Any] = {
        "targets": [r"re:.*layers\.(1|7|10|12)\.self_attn"],
        "criterion": "loss",
        "max_perplexity_increase": 1e6,
    }
    heldout = run(DEMO_MODEL, windows, **fields)[1].heldout
    assert heldout is not None
    increases = [(value or math.nan) / heldout.base - 1 for value in heldout.path]
    assert len(increases) == 4
    # or the second prefix would be cut off by the first, and the test say nothing
    assert max(increases[0], 0.0) < increases[1] < increases[2], increases
    between = (increases[1] + increases[2]) / 2
    limited = fields | {"max_perplexity_increase": between}
    model, report = run(DEMO_MODEL, windows, **limited)
    assert report.num_replaced == len(linearized(model)) == 2
    assert report.binding is not None
    assert report.binding.startswith(f"max_perplexity_increase={between} (")
    assert f"{increases[2]:.4g}" in report.binding
    assert report.heldout is not None
    assert report.heldout.path == heldout.path[:2]
    assert report.heldout.replaced == heldout.path[1]
    assert report.layers[0].reason.endswith(report.binding)
    _, report = run(DEMO_MODEL, windows, **limited, num_layers=1)
    assert report.binding == "num_layers=1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_nmse": 1e-3}, r"max_nmse: no layer fits the budget 0\.001; the lowest"),
        (
            {"max_perplexity_increase": 0.0},
            r"max_perplexity_increase: no layer fits the budget 0\.0; replacing",
        ),
    ],
)
def test_nothing_fits(
    windows: Dataset, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    modifier = NBLModifier(targets=[r"re:.*layers\.1\.self_attn"], **fields)
    model = load(DEMO_MODEL)
    with pytest.raises(ValueError, match=message):
        compress(model, modifier, windows, output_dir=str(tmp_path / "out"))
    assert linearized(model) == []
    assert not (tmp_path / "out").exists()


def test_one_batch_cannot_be_split(llama: Path, rows: Dataset) -> None:
    with pytest.raises(ValueError, match=r"got one batch.*smaller batch_size"):
        compress(
            load(llama),
            NBLModifier(num_layers=1, criterion="loss"),
            rows,
            batch_size=16,
        )


def test_too_few_tokens_are_left_to_fit_on(llama: Path) -> None:
    few = token_rows(num_rows=8, length=5)  # 40 tokens for 32 dimensions, 30 to fit on
    with pytest.raises(ValueError, match=r"to fit on: 30 tokens"):
        compress(load(llama), NBLModifier(num_layers=1, criterion="loss"), few)
