# SPDX-License-Identifier: Apache-2.0
"""``nbl rank``, and statistics on disk from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.records.compression import NBLReport

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "models" / "pycode-4m")
RECIPE = str(ROOT / "recipes" / "nbl.yaml")
SMALL = ["--num-samples", "32", "--max-seq-length", "128", "--batch-size", "8"]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what ``nbl rank`` saved: statistics, ranking and plot."""
    folder = tmp_path_factory.mktemp("rank")
    arguments = ["rank", MODEL, *SMALL, "--statistics", str(folder / "statistics")]
    assert main([*arguments, "--output", str(folder / "ranking")]) == 0
    return folder


def ranking(folder: Path) -> NBLReport:
    return NBLReport.load(folder / "nbl_ranking.json")


def test_ranking_measures_all_and_replaces_nothing(statistics: Path) -> None:
    report = ranking(statistics / "ranking")
    assert [layer.rank for layer in report.ranking] == list(range(1, 17))
    assert report.selected_layers == []
    assert not any(layer.selected for layer in report.layers)
    assert report.num_tokens == 32 * 128
    assert (statistics / "ranking" / "nbl_ranking.png").stat().st_size > 0


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What data there might be is not even looked for."""
    monkeypatch.setattr("nbl_modifier.evaluation.texts.stdlib_texts", None)


@pytest.mark.usefixtures("no_data")
def test_another_criterion_needs_no_data(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", MODEL, "--statistics", str(statistics / "statistics")]
    options = ["--criterion", "nmse", "--output", str(tmp_path)]
    assert main([*arguments, *options]) == 0
    nmse = [layer.nmse for layer in ranking(tmp_path).ranking]
    assert nmse == sorted(nmse)
    assert nmse == pytest.approx(
        sorted(layer.nmse for layer in ranking(statistics / "ranking").layers)
    )
    assert "ranked by nmse" in capsys.readouterr().out


@pytest.mark.usefixtures("no_data")
def test_compress_uses_the_statistics(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(statistics / "statistics")
    arguments = ["compress", MODEL, "--recipe", RECIPE, "--statistics", folder]
    options = ["--output", str(tmp_path / "out"), "--heldout", "none"]
    assert main([*arguments, *options]) == 0
    assert f"calibration: statistics in {folder}" in capsys.readouterr().out
    report = NBLReport.load(tmp_path / "out" / "nbl_report.json")
    best = [layer.index for layer in ranking(statistics / "ranking").ranking[:4]]
    assert report.selected_layers == sorted(best)


def test_other_data_are_refused(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", MODEL, *SMALL, "--seed", "1", "--output", str(tmp_path)]
    folder = str(statistics / "statistics")
    assert main([*arguments, "--statistics", folder]) == 2
    assert "this run's calibration data has" in capsys.readouterr().err


def test_a_recipe_without_nbl_has_no_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "s_stage: {s_modifiers: {QuantizationModifier: {scheme: FP8_DYNAMIC, "
        "targets: [Linear]}}}"
    )
    arguments = ["compress", MODEL, "--recipe", str(recipe)]
    options = ["--output", str(tmp_path / "out"), "--statistics", str(tmp_path)]
    assert main([*arguments, *options]) == 2
    assert "the recipe has no NBLModifier" in capsys.readouterr().err


def test_two_processes_rank_alike(statistics: Path, tmp_path: Path) -> None:
    """The command under torchrun: only the first process prints and writes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "nbl_modifier.cli"]
    result = subprocess.run(
        [*torchrun, "rank", MODEL, *SMALL, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written: ") == 1
    mine, theirs = ranking(tmp_path), ranking(statistics / "ranking")
    assert mine.num_tokens == theirs.num_tokens
    assert mine.num_calibration_samples == theirs.num_calibration_samples
    # bfloat16 activations of other batches: not bit for bit
    bounds = {layer.index: layer.cca_bound for layer in theirs.layers}
    for layer in mine.layers:
        assert layer.cca_bound == pytest.approx(bounds[layer.index], rel=1e-2)


@pytest.mark.usefixtures("no_data")
def test_canonical_correlations_are_written_and_drawn(
    statistics: Path, tmp_path: Path
) -> None:
    arguments = ["rank", MODEL, "--statistics", str(statistics / "statistics")]
    arguments += ["--canonical-correlations", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert all(layer.canonical_correlations for layer in ranking(tmp_path).layers)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| layer | least ρ |" in text.partition("Canonical correlations")[2]


def test_json_is_a_report(statistics: Path) -> None:
    text = (statistics / "ranking" / "nbl_ranking.json").read_text()
    assert json.loads(text)["criterion"] == "cca_bound"
