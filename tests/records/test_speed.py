# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as they are read again: ratios of what was measured in turn."""

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_modifier.records.speed import SPEED_FILE_NAME, Capacity, SpeedReport

REPORT = SpeedReport.load(
    Path(__file__).parents[1] / "data" / "records" / SPEED_FILE_NAME
)


def test_ratios_are_by_round() -> None:
    prefill, decode = REPORT.rows
    assert prefill.ratios == [1.2, 1.3]
    assert prefill.ratio == pytest.approx(1.25)
    assert prefill.predicted_ratio == 1.25
    assert prefill.attained == pytest.approx(1.0)
    assert decode.ratios == [2.0, 2.0]
    assert decode.attained == 1.0


def test_rounds_come_in_pairs() -> None:
    row = replace(REPORT.rows[0], base=[100.0])
    with pytest.raises(ValueError, match="longer"):
        row.ratios  # noqa: B018  # reading it is the test


@pytest.mark.parametrize(
    ("base", "compressed", "expected"),
    [(100, 150, 1.5), (0, 150, None), (None, None, None), (100, None, None)],
)
def test_capacity_is_a_ratio_where_both_are_known(
    base: int | None, compressed: int | None, expected: float | None
) -> None:
    assert Capacity(base, compressed, None, {}).ratio == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a benchmark"),
        ('{"format_version": 99}', "reads a benchmark up to 1"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        SpeedReport.load(path)
