# SPDX-License-Identifier: Apache-2.0
"""
Every kind of file is read as it was written, and refused by name when it is damaged.

``data/records`` holds one file of each kind, written before records were models.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME, EvaluationReport
from nbl_modifier.records.measurements import MEASUREMENTS_FILE_NAME, MeasurementsFile
from nbl_modifier.records.methods import METHODS_FILE_NAME, MethodsTable
from nbl_modifier.records.record import Record
from nbl_modifier.records.speed import SPEED_FILE_NAME, SpeedReport

GOLDEN = Path(__file__).parents[1] / "data" / "records"
KINDS: dict[str, type[Record]] = {
    REPORT_FILE_NAME: NBLReport,
    EVALUATION_FILE_NAME: EvaluationReport,
    SPEED_FILE_NAME: SpeedReport,
    METHODS_FILE_NAME: MethodsTable,
    MEASUREMENTS_FILE_NAME: MeasurementsFile,
}
OURS = [name for name in KINDS if name != MEASUREMENTS_FILE_NAME]
kinds = pytest.mark.parametrize("name", KINDS)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where everything inside of a JSON value is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def changed(fields: Any, place: tuple[Any, ...], value: Any) -> str:
    """Return JSON text with ``value`` at one place."""
    fields = copy.deepcopy(fields)
    inner = fields
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(fields)


def test_there_is_a_file_of_each_kind() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_is_what_was_written_before(name: str) -> None:
    """To the byte: keys, their order, digits and indentation."""
    assert KINDS[name].load(GOLDEN / name).to_json() == (GOLDEN / name).read_text()


@kinds
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    record = KINDS[name].load(GOLDEN / name)
    record.save(tmp_path / name)
    assert KINDS[name].load(tmp_path / name) == record
    assert [path.name for path in tmp_path.iterdir()] == [name]


@kinds
def test_every_damaged_value_is_named(name: str, tmp_path: Path) -> None:
    """An object in place of a value, anywhere, but where values are free."""
    fields = json.loads((GOLDEN / name).read_text())
    path = tmp_path / name
    tried = 0
    for place in places(fields):
        if place == ("format_version",) or place[0] in ("settings", "machine"):
            continue
        path.write_text(changed(fields, place, {"damaged": None}))
        with pytest.raises(ValueError, match="damaged") as caught:
            KINDS[name].load(path)
        said = str(caught.value)
        assert said.startswith(f"{path}: not {KINDS[name].TITLE}: "), said
        assert ".".join(map(str, place)) in said
        assert KINDS[name].REMEDY in said
        tried += 1
    assert tried > 10


@kinds
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "expected a JSON object with an integer format_version, got \\[\\]"),
        ("{}", "integer format_version, got None"),
        ('{"format_version": "1"}', "integer format_version, got '1'"),
        ('{"format_version": 1}', "field required"),
    ],
)
def test_other_files_are_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        KINDS[name].load(path)
    assert str(caught.value).startswith(f"{path}: not {KINDS[name].TITLE}: ")
    assert str(caught.value).endswith(KINDS[name].REMEDY)


@kinds
def test_bytes_that_are_no_text_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{name}: not .*: not UTF-8"):
        KINDS[name].load(path)


@kinds
def test_newer_format_is_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    fields = json.loads((GOLDEN / name).read_text())
    newer = KINDS[name].VERSION + 1
    path = tmp_path / name
    path.write_text(json.dumps(fields | {"format_version": newer, "new": 1}))
    message = rf"{name}: format_version is {newer}.*pip install --upgrade"
    with pytest.raises(ValueError, match=message):
        KINDS[name].load(path)


@pytest.mark.parametrize("name", OURS)
def test_unknown_field_is_named(name: str) -> None:
    fields = json.loads((GOLDEN / name).read_text())
    with pytest.raises(ValueError, match="colour: unexpected .*, got 'red'"):
        KINDS[name].from_json(json.dumps(fields | {"colour": "red"}))


def test_other_programs_may_note_more() -> None:
    fields = json.loads((GOLDEN / MEASUREMENTS_FILE_NAME).read_text())
    text = json.dumps(fields | {"colour": "red"})
    known = MeasurementsFile.load(GOLDEN / MEASUREMENTS_FILE_NAME)
    assert MeasurementsFile.from_json(text) == known


def test_many_errors_are_counted() -> None:
    report = json.loads((GOLDEN / REPORT_FILE_NAME).read_text())
    for layer in report["layers"]:
        layer["name"] = layer["index"] = "x" * 99
    with pytest.raises(ValueError, match="and 1 more|and 5 more") as caught:
        NBLReport.from_json(json.dumps(report))
    assert "x" * 60 not in str(caught.value)
