# SPDX-License-Identifier: Apache-2.0
"""``nbl benchmark`` refuses bad input before it loads anything."""

from pathlib import Path

import pytest

from nbl_modifier.cli import main
from tests.tiny_llama import save_llama


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "300"], "none of 300 and 64 generated tokens fits the 256"),
        (["--dtype", "int3"], "runs in int3"),
        (["--output", "/proc/nothing"], "cannot be made"),
    ],
)
def test_bad_input_loads_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    model = str(save_llama(tmp_path / "model"))
    arguments = ["benchmark", model, "--baseline", model]
    assert main([*arguments, "--engine", "transformers", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "loading" not in error
