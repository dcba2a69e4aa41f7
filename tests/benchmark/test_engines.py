# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own: how they fail."""

import json
from pathlib import Path

import pytest

from nbl_modifier.cli import main


def test_an_engine_that_dies_shows_the_end_of_its_log(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((models[0] / "config.json").read_text())
    config["hidden_act"] = "no such function"
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes(
        (models[0] / "model.safetensors").read_bytes()
    )
    arguments = ["benchmark", str(broken), "--baseline", str(broken)]
    code = main([*arguments, "--engine", "transformers", "--context", "16"])
    assert code == 2
    error = capsys.readouterr().err
    assert "the engine failed with exit code 1" in error
    assert "no such function" in error
