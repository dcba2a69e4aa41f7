# SPDX-License-Identifier: Apache-2.0
"""Statistics kept by one command and used by another, which then takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.records.compression import NBLReport
from tests.cli.test_compress import HELDOUT, MODEL, RECIPE, SMALL
from tests.tiny_llama import tensors_in

GPTQ_ALONE = """
default_stage:
  default_modifiers:
    GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head]}
"""


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics") / "kept"
    assert main(["rank", MODEL, *SMALL, "--save-statistics", str(folder)]) == 0
    return folder


def test_the_checkpoint_is_that_of_a_calibration(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no text is measured unless one is named: that would take most of the time."""
    command = ["compress", MODEL, "--recipe", RECIPE, "--output"]
    expected, output = tmp_path / "expected", tmp_path / "output"
    none = ["--heldout", "none"]
    assert main([*command, str(expected), *SMALL, *none]) == 0
    capsys.readouterr()
    assert main([*command, str(output), "--statistics", str(statistics)]) == 0
    assert "perplexity" not in capsys.readouterr().out
    for name, tensor in tensors_in(expected).items():
        assert tensor.equal(tensors_in(output)[name]), name
    reports = [NBLReport.load(each / "nbl_report.json") for each in (expected, output)]
    assert reports[0].selected_layers == reports[1].selected_layers
    asked = ["--heldout", "stdlib", *HELDOUT, "--max-seq-length", "128"]
    again = [*command, str(output), "--overwrite", "--statistics", str(statistics)]
    assert main([*again, *asked]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (GPTQ_ALONE, "the recipe has no NBLModifier"),
        (
            "default_stage:\n  default_modifiers:\n"
            "    NBLModifier: {num_layers: 1, statistics: elsewhere}\n",
            "NBLModifier.statistics: elsewhere already",
        ),
    ],
    ids=["no NBL", "two folders"],
)
def test_what_cannot_use_them_is_refused(
    statistics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    message: str,
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    command = ["compress", MODEL, "--recipe", str(file), "--output"]
    given = ["--statistics", str(statistics)]
    assert main([*command, str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
