# SPDX-License-Identifier: Apache-2.0
"""``--statistics`` and ``--save-statistics`` reach the recipe's NBLModifier."""

import argparse
from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.cli.statistics import add_statistics_arguments, use_statistics
from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier
from nbl_modifier.llmcompressor_plugin.recipe_file import load_recipe
from nbl_modifier.records.compression import NBLReport
from tests.cli.test_compress import HELDOUT, MODEL, RECIPE, SMALL
from tests.tiny_llama import tensors_in

NBL = "NBLModifier: {num_layers: 2}"
QUANTIZER = "QuantizationModifier: {targets: [Linear], scheme: FP8_DYNAMIC}"
GPTQ = "GPTQModifier: {targets: [Linear], scheme: W4A16}"


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_statistics_arguments(parser.add_argument_group())
    return parser.parse_args(options)


def use(
    folder: Path, *modifiers: str, options: tuple[str, ...]
) -> tuple[bool, list[NBLModifier]]:
    """Return whether data are needed, and the recipe's NBLModifiers."""
    path = folder / "recipe.yaml"
    lines = "\n".join(f"    {modifier}" for modifier in modifiers)
    path.write_text(f"default_stage:\n  default_modifiers:\n{lines}\n")
    recipe = load_recipe(str(path))
    needs_data = use_statistics(parse(*options), recipe)
    own = [each for each in recipe.modifiers if isinstance(each, NBLModifier)]
    return needs_data, own


@pytest.mark.parametrize(
    ("modifiers", "options", "needs_data"),
    [
        ([NBL], (), True),
        ([NBL], ("--save-statistics", "s"), True),
        ([NBL], ("--statistics", "s"), False),
        ([NBL, QUANTIZER], ("--statistics", "s"), False),
        ([NBL, GPTQ], ("--statistics", "s"), True),
        ([QUANTIZER], (), False),
    ],
)
def test_data_are_needed_where_nothing_stands_for_them(
    tmp_path: Path, modifiers: list[str], options: tuple[str, ...], needs_data: bool
) -> None:
    assert use(tmp_path, *modifiers, options=options)[0] is needs_data


def test_folders_reach_the_modifier(tmp_path: Path) -> None:
    _, (modifier,) = use(tmp_path, NBL, options=("--statistics", "s"))
    assert (modifier.statistics, modifier.save_statistics) == ("s", None)
    _, (modifier,) = use(tmp_path, NBL, options=("--save-statistics", "s"))
    assert (modifier.statistics, modifier.save_statistics) == (None, "s")


def test_another_folder_in_the_recipe_is_refused(tmp_path: Path) -> None:
    modifier = "NBLModifier: {num_layers: 2, save_statistics: there}"
    message = r"--statistics here: .*save_statistics: there"
    with pytest.raises(ValueError, match=message):
        use(tmp_path, modifier, options=("--statistics", "here"))
    _, (same,) = use(tmp_path, modifier, options=("--save-statistics", "there"))
    assert same.save_statistics == "there"


def test_no_modifier_to_use_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the recipe has no NBLModifier"):
        use(tmp_path, QUANTIZER, options=("--statistics", "s"))


def test_both_options_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--statistics", "a", "--save-statistics", "b")
    assert "not allowed with" in capsys.readouterr().err


def test_the_checkpoint_is_that_of_a_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no text is measured unless one is named: that would take most of the time."""
    kept, ranking = str(tmp_path / "kept"), str(tmp_path / "ranking")
    measure = ["rank", MODEL, *SMALL, "--output", ranking]
    assert main([*measure, "--save-statistics", kept]) == 0
    command = ["compress", MODEL, "--recipe", RECIPE, "--output"]
    expected, output = tmp_path / "expected", tmp_path / "output"
    assert main([*command, str(expected), *SMALL, "--heldout", "none"]) == 0
    capsys.readouterr()
    assert main([*command, str(output), "--statistics", kept]) == 0
    assert "perplexity" not in capsys.readouterr().out
    for name, tensor in tensors_in(expected).items():
        assert tensor.equal(tensors_in(output)[name]), name
    reports = [NBLReport.load(each / "nbl_report.json") for each in (expected, output)]
    assert reports[0].selected_layers == reports[1].selected_layers
    asked = ["--heldout", "stdlib", *HELDOUT, "--max-seq-length", "128"]
    again = [*command, str(output), "--overwrite", "--statistics", kept]
    assert main([*again, *asked]) == 0
    assert "perplexity" in capsys.readouterr().out
