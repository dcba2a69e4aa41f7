"""``nbl benchmark`` in real vLLM."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from integration_tests.harness import (
    ENGINE_TIMEOUT_SECONDS,
    serve_python,
    vllm_environment,
)
from integration_tests.materials import DEMO_DIRECTORY
from nbl_modifier.records.speed import SpeedReport

RECIPE = "default_stage: {default_modifiers: {NBLModifier: {layers: [0, 5, 9, 15]}}}"


@pytest.fixture(scope="module")
def report(checkpoint: Callable[[str], Path], workplace: Path) -> SpeedReport:
    """Return what the command wrote about the demo model and 4 of 16 layers linear."""
    folder = workplace / "speed"
    command = [serve_python(), "-m", "nbl_modifier.cli", "benchmark"]
    arguments = [str(checkpoint(RECIPE)), "--baseline", str(DEMO_DIRECTORY)]
    arguments += ["--context", "700", "--batch", "1,2,400", "--engine", "vllm"]
    # A bfloat16 model takes many minutes on CPUs without instructions for it.
    arguments += ["--dtype", "float32"]
    arguments += ["--generate-tokens", "8", "--repeats", "1", "--output", str(folder)]
    result = subprocess.run(
        [*command, *arguments],
        env=vllm_environment(workplace / "vllm_cache"),
        capture_output=True,
        text=True,
        timeout=2 * ENGINE_TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return SpeedReport.load(folder / "nbl_benchmark.json")


def test_every_cell_that_fits_is_measured(report: SpeedReport) -> None:
    cells = {(row.phase, row.context, row.batch) for row in report.rows}
    phases = ("prefill", "decode")
    assert cells == {(phase, 700, batch) for phase in phases for batch in (1, 2)}
    for row in report.rows:
        assert min(*row.base, *row.compressed) > 0


def test_decoding_is_timed_over_the_tokens_asked_for(report: SpeedReport) -> None:
    """All but the step that the window starts after; more while others were read."""
    for row in report.rows:
        if row.phase == "decode":
            assert row.generated >= 7


def test_capacity_grows_by_k_over_k_minus_m(report: SpeedReport) -> None:
    capacity = report.capacity
    assert capacity.predicted_ratio == 16 / 12
    # vLLM rounds down to whole blocks.
    assert capacity.ratio == pytest.approx(16 / 12, rel=1e-3)


def test_a_batch_that_does_not_fit_is_not_measured(report: SpeedReport) -> None:
    base, compressed = report.capacity.largest_batch["700"]
    assert base < 400
    assert compressed == pytest.approx(base * 16 / 12, abs=1)
    (cell,) = report.skipped
    assert (cell.context, cell.batch) == (700, 400)
    assert f"tokens, {base} such sequences" in cell.reason
