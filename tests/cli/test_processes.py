# SPDX-License-Identifier: Apache-2.0
"""Processes that torchrun starts share rows and samples; alone, one has all."""

import contextlib
import io

import pytest
from datasets import Dataset

from nbl_modifier.cli.processes import (
    part_of,
    process_group,
    rank,
    share_of,
    world_size,
)

ROWS = Dataset.from_dict({"row": list(range(10))})


def numbered(monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_alone_one_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (rank(), world_size()) == (0, 1)
    assert part_of(ROWS) is ROWS
    assert share_of(7, 10) == 7
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), process_group():
        print("heard")  # noqa: T201
    assert printed.getvalue() == "heard\n"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_row_is_in_one_part(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    parts = []
    for number in range(count):
        numbered(monkeypatch, number, count)
        parts.append(part_of(ROWS)["row"])
    assert sorted(row for part in parts for row in part) == ROWS["row"]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("count", "samples"), [(2, 5), (3, 7), (4, 3), (4, 8)])
def test_shares_add_up(
    monkeypatch: pytest.MonkeyPatch, count: int, samples: int
) -> None:
    shares = []
    for number in range(count):
        numbered(monkeypatch, number, count)
        shares.append(share_of(samples, available=100))
    assert sum(shares) == samples
    assert max(shares) - min(shares) <= 1


def test_a_share_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(monkeypatch, 1, 2)
    assert share_of(100, available=3) == 3
