# SPDX-License-Identifier: Apache-2.0
"""``nbl benchmark`` in transformers: real processes, real measurements."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.records.speed import SpeedReport

Run = Callable[..., SpeedReport]


def test_every_cell_is_measured_in_every_round(together: SpeedReport) -> None:
    cells = {(row.phase, row.context, row.batch) for row in together.rows}
    assert cells == {
        (phase, context, batch)
        for phase in ("prefill", "decode")
        for context in (16, 32)
        for batch in (1, 2)
    }
    for row in together.rows:
        assert len(row.base) == len(row.compressed) == len(row.ratios) == 2
        assert min(*row.base, *row.compressed) > 0
        assert row.generated == (3 if row.phase == "decode" else 0)
        # Half of the attention is gone, and all that takes its place is smaller.
        assert row.predicted_ratio > 1
        assert row.attained == row.ratio / row.predicted_ratio


def test_what_does_not_fit_is_named(together: SpeedReport) -> None:
    assert [(cell.context, cell.batch) for cell in together.skipped] == [
        (4096, 1),
        (4096, 2),
    ]
    reason = "4096 + 3 tokens, the model has 256 positions"
    assert {cell.reason for cell in together.skipped} == {reason}


def test_one_at_a_time_measures_the_same_cells(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(
        *("--context", "16", "--batch", "1,2", "--generate-tokens", "2"),
        *("--repeats", "1", "--one-at-a-time", "--attention", "eager"),
    )
    assert [(row.phase, row.batch) for row in report.rows] == [
        ("prefill", 1),
        ("prefill", 2),
        ("decode", 1),
        ("decode", 2),
    ]
    assert report.settings["together"] is False
    output = capsys.readouterr().out
    for heading in ("base tokens/s", "predicted", "attained", "GFLOP/s"):
        assert heading in output


def test_random_weights_need_only_configs(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    folders = []
    for model in models:
        folder = tmp_path / model.name
        folder.mkdir()
        (folder / "config.json").write_bytes((model / "config.json").read_bytes())
        folders.append(str(folder))
    options = ["--random-weights", "--engine", "transformers", "--context", "16"]
    options += ["--batch", "1", "--generate-tokens", "2", "--repeats", "1"]
    code = main(
        ["benchmark", folders[1], "--baseline", folders[0], *options]
        + ["--output", str(tmp_path)]
    )
    assert code == 0
    assert len(SpeedReport.load(tmp_path / "nbl_benchmark.json").rows) == 2


def test_time_limit_names_itself(run: Run) -> None:
    options = ("--batch", "1", "--generate-tokens", "2", "--repeats", "1")
    report = run("--context", "16", *options, "--max-seconds", "1e-12")
    assert report.rows == []
    (cell,) = report.skipped
    assert "--max-seconds is" in cell.reason


def test_report_survives_json(together: SpeedReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    together.save(path)
    assert SpeedReport.load(path) == together
