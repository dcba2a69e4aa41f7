# SPDX-License-Identifier: Apache-2.0
"""``--statistics`` reaches the recipe's NBLModifier, and stands for data or not."""

import argparse
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from nbl_modifier.cli import build_parser, main
from nbl_modifier.cli.statistics import use_statistics
from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier
from nbl_modifier.llmcompressor_plugin.recipe_file import load_recipe
from nbl_modifier.records.compression import NBLReport
from tests.cli.test_compress import HELDOUT, MODEL, RECIPE, SMALL
from tests.tiny_llama import tensors_in

NBL = "NBLModifier: {num_layers: 2}"
SOME = "NBLModifier: {num_layers: 2, ignore: ['re:.*layers.3.*']}"
AGAIN = "NBLModifier: {num_layers: 2, refit: true}"
QUANTIZER = "QuantizationModifier: {targets: [Linear], scheme: FP8_DYNAMIC}"
GPTQ = "GPTQModifier: {targets: [Linear], scheme: W4A16}"


def parse(*options: str) -> argparse.Namespace:
    required = ["compress", MODEL, "--recipe", "r.yaml", "--output", "out"]
    return build_parser().parse_args([*required, *options])


def use(
    folder: Path, *modifiers: str, options: tuple[str, ...]
) -> tuple[bool, list[NBLModifier]]:
    """Return whether data are needed, and the recipe's NBLModifiers."""
    path = folder / "recipe.yaml"
    lines = "\n".join(f"    {modifier}" for modifier in modifiers)
    path.write_text(f"default_stage:\n  default_modifiers:\n{lines}\n")
    recipe = load_recipe(str(path))
    config = AutoConfig.from_pretrained(MODEL)
    needs_data = use_statistics(parse(*options), recipe, config)
    own = [each for each in recipe.modifiers if isinstance(each, NBLModifier)]
    return needs_data, own


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return statistics of all layers, and the ranking beside them."""
    folder = tmp_path_factory.mktemp("kept")
    measure = ["rank", MODEL, *SMALL, "--output", str(folder / "ranking")]
    assert main([*measure, "--statistics", str(folder / "statistics")]) == 0
    return folder / "statistics"


@pytest.fixture
def interrupted(kept: Path, tmp_path: Path) -> Path:
    """Return those of a calibration that was stopped in front of layer 3."""
    folder = tmp_path / "interrupted"
    shutil.copytree(kept, folder)
    for index in range(3, 16):
        (folder / f"layer-{index:05d}.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("modifiers", "needs_data"), [([NBL], True), ([QUANTIZER], False)]
)
def test_data_are_needed_without_statistics(
    tmp_path: Path, modifiers: list[str], needs_data: bool
) -> None:
    assert use(tmp_path, *modifiers, options=())[0] is needs_data
    if modifiers == [NBL]:
        absent = ("--statistics", str(tmp_path / "absent"))
        assert use(tmp_path, *modifiers, options=absent)[0]


@pytest.mark.parametrize(
    ("modifiers", "options", "needs_data"),
    [
        ([NBL], (), False),
        ([NBL, QUANTIZER], (), False),
        ([NBL, GPTQ], (), True),
        ([AGAIN], (), True),
        ([NBL], ("--dataset", "c4"), True),
        ([NBL], ("--num-samples", "8"), True),
        ([NBL], ("--max-seq-length", "128"), True),
        ([NBL], ("--max-seq-length", "128", "--heldout", "stdlib"), False),
    ],
)
def test_complete_statistics_stand_for_data_unless_asked_for(
    kept: Path,
    tmp_path: Path,
    modifiers: list[str],
    options: tuple[str, ...],
    needs_data: bool,
) -> None:
    options = ("--statistics", str(kept), *options)
    assert use(tmp_path, *modifiers, options=options)[0] is needs_data


def test_only_layers_that_are_asked_for_must_be_there(
    kept: Path, interrupted: Path, tmp_path: Path
) -> None:
    options = ("--statistics", str(interrupted))
    assert use(tmp_path, NBL, options=options)[0]
    assert not use(tmp_path, "NBLModifier: {layers: [0, 2]}", options=options)[0]
    shutil.rmtree(interrupted)
    shutil.copytree(kept, interrupted)
    (interrupted / "layer-00003.safetensors").unlink()
    assert use(tmp_path, NBL, options=options)[0]
    assert not use(tmp_path, SOME, options=options)[0]


def test_a_folder_in_the_recipe_is_looked_into(kept: Path, tmp_path: Path) -> None:
    modifier = f"NBLModifier: {{num_layers: 2, statistics: {kept}}}"
    assert not use(tmp_path, modifier, options=())[0]


def test_the_folder_reaches_the_modifier(tmp_path: Path) -> None:
    _, (modifier,) = use(tmp_path, NBL, options=("--statistics", "s"))
    assert modifier.statistics == "s"


def test_the_old_name_warns_and_takes_data(
    kept: Path, tmp_path: Path, logged: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--save-statistics", str(kept))
    needs_data, (modifier,) = use(tmp_path, NBL, options=options)
    assert needs_data
    assert modifier.statistics == str(kept)
    assert [text for text in logged if "--save-statistics is now --statistics" in text]
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    shown = capsys.readouterr().out
    assert "--statistics DIR" in shown
    assert "--save-statistics" not in shown


def test_another_folder_in_the_recipe_is_refused(tmp_path: Path) -> None:
    modifier = "NBLModifier: {num_layers: 2, statistics: there}"
    message = r"--statistics here: .*statistics: there"
    with pytest.raises(ValueError, match=message):
        use(tmp_path, modifier, options=("--statistics", "here"))
    _, (same,) = use(tmp_path, modifier, options=("--statistics", "there"))
    assert same.statistics == "there"


def test_no_modifier_to_use_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the recipe has no NBLModifier"):
        use(tmp_path, QUANTIZER, options=("--statistics", "s"))


def test_both_options_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--statistics", "a", "--save-statistics", "b")
    assert "not allowed with" in capsys.readouterr().err


def test_an_interrupted_command_goes_on(
    kept: Path, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started again as it was; and once more, when nothing is left to measure."""
    command = ["rank", MODEL, *SMALL, "--output", str(tmp_path / "ranking")]
    for found in (3, 16):
        assert main([*command, "--statistics", str(interrupted)]) == 0
        said = capsys.readouterr().err
        assert f"statistics of {found} of 16 layers are read" in said
    name = "nbl_ranking.json"
    mine, theirs = (
        NBLReport.load(folder / "ranking" / name) for folder in (tmp_path, kept.parent)
    )
    assert [each.score for each in mine.ranking] == pytest.approx(
        [each.score for each in theirs.ranking], rel=1e-9
    )


def test_the_checkpoint_is_that_of_a_calibration(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no text is measured unless one is named: that would take most of the time."""
    command = ["compress", MODEL, "--recipe", RECIPE, "--output"]
    expected, output = tmp_path / "expected", tmp_path / "output"
    assert main([*command, str(expected), *SMALL, "--heldout", "none"]) == 0
    capsys.readouterr()
    assert main([*command, str(output), "--statistics", str(kept)]) == 0
    assert "perplexity" not in capsys.readouterr().out
    for name, tensor in tensors_in(expected).items():
        assert tensor.equal(tensors_in(output)[name]), name
    reports = [NBLReport.load(each / "nbl_report.json") for each in (expected, output)]
    assert reports[0].selected_layers == reports[1].selected_layers
    asked = ["--heldout", "stdlib", *HELDOUT, "--max-seq-length", "128"]
    again = [*command, str(output), "--overwrite", "--statistics", str(kept)]
    assert main([*again, *asked]) == 0
    assert "perplexity" in capsys.readouterr().out
