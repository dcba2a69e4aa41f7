# SPDX-License-Identifier: Apache-2.0
"""Two models, and ``nbl benchmark`` run on them: real processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_modifier import NBLModifier
from nbl_modifier.cli import main
from nbl_modifier.records.speed import SpeedReport
from tests.tiny_llama import compress, load, save_llama, token_rows

Run = Callable[..., SpeedReport]
GRID = ("--context", "16,32,4096", "--batch", "1,2", "--generate-tokens", "3")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a random Llama of 4 layers, and the same with 2 of them linearized."""
    folder = tmp_path_factory.mktemp("benchmark")
    base = save_llama(folder / "base")
    compress(
        load(base),
        [NBLModifier(layers=[0, 2])],
        token_rows(),
        output_dir=str(folder / "nbl"),
    )
    return base, folder / "nbl"


@pytest.fixture(scope="session")
def run(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the command and returns the report it wrote."""

    def call(*options: str) -> SpeedReport:
        folder = tmp_path_factory.mktemp("speed")
        base, compressed = map(str, models)
        arguments = ["benchmark", compressed, "--baseline", base, "--output", folder]
        arguments += ["--engine", "transformers", *options]
        assert main([str(argument) for argument in arguments]) == 0
        return SpeedReport.load(folder / "nbl_benchmark.json")

    return call


@pytest.fixture(scope="session")
def together(run: Run) -> SpeedReport:
    return run(*GRID, "--repeats", "2")
