# SPDX-License-Identifier: Apache-2.0
"""The report survives JSON, and refuses what it cannot read."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from nbl_modifier.records.compression import FORMAT_VERSION, NBLReport
from tests.report.report_factory import make_report


def test_json_round_trip_keeps_every_field() -> None:
    report = make_report()
    assert NBLReport.from_json(report.to_json()) == report


def test_evaluation_and_recipe_may_be_missing_values() -> None:
    report = make_report(evaluation=None, recipe=None)
    assert NBLReport.from_json(report.to_json()) == report


def test_json_is_an_object_other_tools_can_read() -> None:
    fields = json.loads(make_report().to_json())
    assert fields["layers"][2]["cca_bound"] == 1.25
    assert fields["selected_layers"] == [0, 2]


def test_derived_values() -> None:
    report = make_report()
    assert report.num_replaced == 2
    assert report.kv_cache_fraction == 0.5
    assert [layer.index for layer in report.ranking] == [2, 0, 3, 1]


def test_newer_format_is_refused_with_the_remedy() -> None:
    text = make_report(format_version=FORMAT_VERSION + 1).to_json()
    with pytest.raises(ValueError, match=r"format_version is 3.*pip install --upgrade"):
        NBLReport.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("index", "1"), ("index", 1.5), ("nmse", None), ("selected", 1), ("name", 3)],
)
def test_field_of_another_type_is_named(field: str, value: object) -> None:
    fields = json.loads(make_report(previous=make_report()).to_json())
    fields["previous"]["layers"][1][field] = value
    wrong = rf"previous\.layers\.1\.{field}: .*, got {value!r}\. Run the compression"
    with pytest.raises(ValueError, match=wrong):
        NBLReport.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "expected a JSON object"),
        ('{"layers": []}', "integer format_version, got None"),
        ('{"format_version": 1, "layers": []}', "model: field required"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        NBLReport.from_json(text)
    said = str(caught.value)
    assert said.startswith("not an NBL report: ")
    assert "Run the compression again" in said


def test_unknown_field_of_a_layer_is_named() -> None:
    fields = json.loads(make_report().to_json())
    fields["layers"][0]["colour"] = "red"
    with pytest.raises(ValueError, match=r"layers\.0\.colour: unexpected .*'red'"):
        NBLReport.from_json(json.dumps(fields))


def test_nan_is_refused_rather_than_written_as_invalid_json() -> None:
    report = make_report(calibration_seconds=math.nan)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json()


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "nbl_report.json"
    make_report().save(path)
    assert NBLReport.load(path) == make_report()
    assert [file.name for file in tmp_path.iterdir()] == ["nbl_report.json"]


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not an NBL report"):
        NBLReport.load(path)


def test_reports_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_report().model = "other"  # type: ignore[misc]
