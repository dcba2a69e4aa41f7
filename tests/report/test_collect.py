# SPDX-License-Identifier: Apache-2.0
"""Files find their models, models their base model, and empty folders are an error."""

from pathlib import Path

import pytest

from nbl_modifier.report.collect import collect
from tests.report.report_factory import (
    write_benchmark,
    write_checkpoint,
    write_measurements,
)

BASE = "some-organization/some-model"


def test_checkpoints_are_grouped_by_base_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "b", [0, 2, 3])
    write_checkpoint(tmp_path / "a", [2])
    write_checkpoint(tmp_path / "deep" / "er" / "c", [0], model="another-model")
    other, group = collect([tmp_path])
    assert (other.model, other.name) == ("another-model", "another-model")
    assert [c.name for c in other.checkpoints] == ["c"]
    assert (group.model, group.name) == (BASE, "some-model")
    assert [c.name for c in group.checkpoints] == ["a", "b"]
    assert group.checkpoints[0].config is not None


def test_measurements_join_the_checkpoint_they_are_of(tmp_path: Path) -> None:
    """However its path is written."""
    write_checkpoint(tmp_path / "a", [2])
    write_benchmark(
        tmp_path / "nbl_benchmark.json", BASE, str(tmp_path / "b" / ".." / "a")
    )
    (tmp_path / "b").mkdir()
    accuracies = {BASE: {"piqa": 0.8}, str(tmp_path / "a"): {"piqa": 0.7}}
    write_measurements(tmp_path / "nbl_measurements.json", accuracies)
    (group,) = collect([tmp_path])
    assert list(group.models) == ["some-model", "a"]
    assert group.models["a"]["piqa"].value == 0.7
    assert group.models["some-model"]["piqa"].value == 0.8
    assert len(group.models["a"]) == 3


def test_model_without_a_report_is_shown_too(tmp_path: Path) -> None:
    accuracies = {BASE: {"piqa": 0.8}, "someone/other-method": {"piqa": 0.6}}
    path = tmp_path / "nbl_measurements.json"
    write_measurements(path, accuracies)
    (group,) = collect([path])
    assert group.checkpoints == []
    assert list(group.models) == ["some-model", "other-method"]


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_checkpoint(tmp_path / folder / "nbl", [2])
    (group,) = collect([tmp_path])
    assert [c.name for c in group.checkpoints] == ["x/nbl", "y/nbl"]


def test_a_file_named_twice_counts_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    (group,) = collect([tmp_path, tmp_path / "a", tmp_path / "a" / "nbl_report.json"])
    assert len(group.checkpoints) == 1


def test_checkpoint_without_config_is_no_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    (tmp_path / "a" / "config.json").unlink()
    (group,) = collect([tmp_path])
    assert group.checkpoints[0].config is None


def test_broken_config_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/config\.json: not JSON"):
        collect([tmp_path])


@pytest.mark.parametrize("name", ["empty", "other.json"])
def test_no_report_is_an_error_that_says_what_one_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix:
        path.write_text("{}")
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=rf"{name}: no report.*nbl_report\.json"):
        collect([path])


def test_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        collect([tmp_path / "nowhere"])


def test_figures_of_what_was_there_before_are_refused(tmp_path: Path) -> None:
    """Measured elsewhere, and the checkpoint written over since."""
    later = "2026-01-02T03:04:06+00:00"
    write_checkpoint(tmp_path / "a", [2], created=later)
    path = tmp_path / "speed" / "nbl_benchmark.json"
    path.parent.mkdir()
    write_benchmark(path, BASE, str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"nbl_benchmark.*before.*Measure again"):
        collect([tmp_path])


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    write_checkpoint(tmp_path / ".a.nbl-incomplete", [0])
    write_checkpoint(tmp_path / "a" / ".nbl-complete", [0])
    (group,) = collect([tmp_path])
    assert [c.name for c in group.checkpoints] == ["a"]
