# SPDX-License-Identifier: Apache-2.0
"""``nbl benchmark`` in transformers: real processes, real measurements."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_modifier import NBLModifier
from nbl_modifier.benchmark.limits import fit_together
from nbl_modifier.benchmark.machine import current_device, free_memory
from nbl_modifier.benchmark.plan import Settings
from nbl_modifier.benchmark.roofline import ModelShape, Product
from nbl_modifier.benchmark.shapes import Model
from nbl_modifier.cli import main
from nbl_modifier.records.speed import SpeedReport
from tests.tiny_llama import compress, load, save_llama, token_rows

Run = Callable[..., SpeedReport]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


GRID = ("--context", "16,32,4096", "--batch", "1,2", "--generate-tokens", "3")


@pytest.fixture(scope="module")
def together(run: Run) -> SpeedReport:
    return run(*GRID, "--repeats", "2")


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


def test_cache_is_measured_as_predicted(together: SpeedReport) -> None:
    base, compressed = together.base, together.compressed
    assert base.linearized == []
    assert compressed.linearized == [0, 2]
    # 4 layers, 2 heads of 8, keys and values, float32
    assert base.kv_bytes_per_token == 4 * 2 * 8 * 2 * 4
    assert base.measured_kv_bytes_per_token == base.kv_bytes_per_token
    # transformers counts tokens by one zero each for key and value of a linear layer.
    counters = 2 * 2 * 4
    assert compressed.kv_bytes_per_token == base.kv_bytes_per_token / 2
    assert (
        compressed.measured_kv_bytes_per_token
        == compressed.kv_bytes_per_token + counters
    )


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


@pytest.mark.parametrize(
    ("engine", "accelerated", "free", "expected"),
    [
        # two models of 1 GB: 2.6 GB to load them, in four fifths of what is free
        ("transformers", False, 3.3e9, True),
        ("transformers", False, 3.2e9, False),
        # and 2 GiB of KV cache for each
        ("vllm", False, 8.7e9, True),
        ("vllm", False, 8.6e9, False),
        # half of the accelerator each, a quarter of that for the KV cache
        ("vllm", True, 3.9e9, True),
        ("vllm", True, 3.8e9, False),
        ("vllm", True, None, True),
    ],
)
def test_models_are_loaded_at_once_if_they_fit(
    engine: Any, accelerated: bool, free: Any, expected: bool
) -> None:
    weight = Product("lm_head", 1, 1, nbytes=1e9, last_only=True)
    shape = ModelShape((weight,), (), activation_bytes=2, kv_bytes=2)
    model = Model("a model", shape, "bfloat16", 1, (), 64, 10)
    settings = Settings(engine, kv_cache_gib=2, on_accelerator=accelerated)
    assert fit_together((model, model), settings, free) is expected


def test_a_build_for_gpus_runs_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch for CUDA names a device without a driver, and cannot use it."""
    accelerator, cuda = torch.accelerator, torch.device("cuda")
    monkeypatch.setattr(accelerator, "current_accelerator", lambda: cuda)
    monkeypatch.setattr(accelerator, "is_available", lambda: False)
    assert current_device() == "cpu"
    monkeypatch.setattr(accelerator, "is_available", lambda: True)
    assert current_device() == "cuda"


def test_free_memory_is_measured() -> None:
    free = free_memory()
    assert free is not None
    assert free > 1e8


def test_time_limit_names_itself(run: Run) -> None:
    options = ("--batch", "1", "--generate-tokens", "2", "--repeats", "1")
    report = run("--context", "16", *options, "--max-seconds", "1e-12")
    assert report.rows == []
    (cell,) = report.skipped
    assert "--max-seconds is" in cell.reason


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "300"], "none of 300 and 64 generated tokens fits the 256"),
        (["--dtype", "int3"], "runs in int3"),
        (["--output", "/proc/nothing"], "cannot be made"),
    ],
)
def test_bad_input_loads_nothing(
    models: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    arguments = ["benchmark", str(models[1]), "--baseline", str(models[0])]
    assert main([*arguments, "--engine", "transformers", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "loading" not in error


def test_report_survives_json(together: SpeedReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    together.save(path)
    assert asdict(SpeedReport.load(path)) == asdict(together)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "not a benchmark"), ('{"format_version": 99}', "reads up to 1")],
)
def test_other_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        SpeedReport.load(path)
