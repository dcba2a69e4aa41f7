# SPDX-License-Identifier: Apache-2.0
"""Tables of methods are read as they were written, and refused when damaged."""

import json
from pathlib import Path

import pytest

from nbl_modifier.records.methods import METHODS_FILE_NAME, MethodsTable
from tests.report.report_factory import make_table, method_row


def test_file_holds_the_table(tmp_path: Path) -> None:
    speed = {"decode": (1.2, 0.1)}
    rows = [*make_table().rows, method_row("fast", 2, 1.5, speed=speed, average=None)]
    table = make_table(rows=rows)
    table.save(tmp_path / METHODS_FILE_NAME)
    assert MethodsTable.load(tmp_path / METHODS_FILE_NAME) == table


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("format_version"),
        lambda fields: fields.update(format_version="1"),
        lambda fields: fields.pop("rows"),
        lambda fields: fields.update(rows=[{"method": "x"}]),
        lambda fields: fields.update(unknown=1),
        lambda fields: fields["rows"][0]["texts"]["c4"].update(perplexity=None),
        lambda fields: fields["rows"][0]["tasks"].update(piqa=[1, 2, 3]),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / METHODS_FILE_NAME
    make_table().save(path)
    fields = json.loads(path.read_text())
    damage(fields)  # type: ignore[operator]
    path.write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=f"{METHODS_FILE_NAME}: not a table of methods"
    ):
        MethodsTable.load(path)
