# SPDX-License-Identifier: Apache-2.0
"""Model and output directory are judged before anything else happens."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from nbl_modifier.cli.checks import check_heldout, check_model, check_output

MODEL = Path(__file__).parents[2] / "examples" / "models" / "pycode-4m"


def make_model(folder: Path, **config: object) -> str:
    """Write a config.json and return the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_supported_model_gives_its_config() -> None:
    assert check_model(str(MODEL), linearize=True).num_hidden_layers == 16


def test_unsupported_architecture_lists_the_supported(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", model_type="gpt2")
    with pytest.raises(NotImplementedError, match=r"'gpt2' is not supported.*llama"):
        check_model(model, linearize=True)


def test_architecture_does_not_matter_without_nbl(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", model_type="gpt2")
    assert check_model(model, linearize=False).model_type == "gpt2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "has no config.json"),
        ("missing", "no such directory"),
        ("../no/such/name", "no such directory"),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, message: str) -> None:
    model = name if name.startswith(".") else str(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        check_model(model, linearize=True)
    assert f"model {model}" in str(error.value)


def test_unknown_hub_name_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"model no/such: cannot be loaded") as error:
        check_model("no/such", linearize=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["new", "new/nested", "empty"])
def test_free_output_is_accepted_and_nothing_is_written(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    check_output(str(tmp_path / name), str(MODEL), overwrite=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_existing_checkpoint_needs_overwrite(tmp_path: Path) -> None:
    output = make_model(tmp_path / "m")
    with pytest.raises(ValueError, match=r"--output .*holds a checkpoint.*--overwrite"):
        check_output(output, str(MODEL), overwrite=False)
    check_output(output, str(MODEL), overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_content_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not empty, and no checkpoint"):
        check_output(str(tmp_path), str(MODEL), overwrite)


def test_model_is_never_its_own_output() -> None:
    with pytest.raises(ValueError, match="is the model itself"):
        check_output(f"{MODEL}/../pycode-4m", str(MODEL), overwrite=True)


def test_unwritable_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"--output .*cannot write in .*Not a directory"
    ):
        check_output(str(tmp_path / "file" / "below"), str(MODEL), overwrite=False)


def rows_of(*texts: range) -> Dataset:
    return Dataset.from_dict({"input_ids": [list(text) for text in texts]})


def test_heldout_text_that_is_calibrated_on_is_refused() -> None:
    """Also where the windows of the two begin at other tokens."""
    text = rows_of(*(range(i, i + 100) for i in range(0, 1000, 100)))
    same = rows_of(*(range(i, i + 100) for i in range(0, 1000, 100)))
    shifted = rows_of(*(range(i + 17, i + 117) for i in range(0, 900, 100)))
    for heldout in (same, shifted):
        with pytest.raises(ValueError, match=r"--heldout a\.txt: \d+ of its .* 'none'"):
            check_heldout("a.txt", text, heldout)


def test_heldout_text_of_which_a_part_is_calibrated_on_is_told() -> None:
    text = rows_of(range(100), range(100, 200))
    heldout = rows_of(*(range(i, i + 100) for i in range(100, 1000, 100)))
    note = check_heldout("a.txt", text, heldout)
    assert note is not None
    assert note.startswith("--heldout a.txt: 1 of its 9 windows are in the calibration")
    # a phrase in common is no such part
    assert check_heldout("a.txt", text, rows_of(range(165, 265))) is None
    assert check_heldout("a.txt", text, rows_of(range(300, 310))) is None


def test_what_a_killed_run_had_finished_is_a_checkpoint(tmp_path: Path) -> None:
    complete = tmp_path / "out" / ".nbl-complete"
    complete.mkdir(parents=True)
    (complete / "config.json").write_text("{}")
    (complete / ".nbl-stale.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds a checkpoint.*--overwrite"):
        check_output(str(tmp_path / "out"), str(MODEL), overwrite=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
