# SPDX-License-Identifier: Apache-2.0
"""Calibration in two gloo processes, against one process on the same data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nbl_modifier import NBLModifier
from nbl_modifier.layer_statistics.sources import Needs, open_sources
from nbl_modifier.layer_statistics.store import StatisticsStore
from tests.tiny_llama import compress, linearized, load, token_rows

SCRIPT = Path(__file__).with_name("distributed_run.py")
ROOT = Path(__file__).parents[2]
# Several times what it takes on two busy cores; gloo itself waits half an hour.
TIMEOUT_SECONDS = 240

Start = Callable[..., "Ended"]


@dataclass(frozen=True)
class Ended:
    """
    How a run ended.

    :param returncode: of the agent, as of torchrun
    :param stderr: of all its processes
    """

    returncode: int
    stderr: str


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    """Return the process that starts the two of each run."""
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(TIMEOUT_SECONDS)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


@pytest.fixture
def start(llama: Path, tmp_path: Path, launcher: subprocess.Popen[str]) -> Start:
    """Return a function that calibrates in two processes."""

    def run(
        output: str = "out",
        *,
        dtype: str = "float64",
        quantize: bool = False,
        sabotage: str | None = None,
        **recipe: Any,
    ) -> Ended:
        job = tmp_path / "job.json"
        job.write_text(
            json.dumps(
                {
                    "model": str(llama),
                    "recipe": recipe,
                    "dtype": dtype,
                    "quantize": quantize,
                    "sabotage": sabotage,
                    "output": str(tmp_path / output),
                }
            )
        )
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        print(job, file=launcher.stdin, flush=True)
        return Ended(**json.loads(launcher.stdout.readline()))

    return run


def answers(output: Path) -> list[dict[str, Any]]:
    """Return what the two processes saved."""
    return [torch.load(f"{output}.rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_find_what_one_finds(
    llama: Path, tmp_path: Path, start: Start
) -> None:
    fields: dict[str, Any] = {"num_layers": 3, "input": "normalized"}
    result = start(**fields)
    assert result.returncode == 0, result.stderr
    modifier = NBLModifier(**fields)
    model = load(llama).to(torch.float64)
    model = compress(model, [modifier], token_rows(16))
    assert modifier.report is not None
    for answer in answers(tmp_path / "out"):
        report = answer["report"]
        assert report["selected_layers"] == modifier.report.selected_layers
        assert report["num_tokens"] == modifier.report.num_tokens == 16 * 64
        assert report["num_calibration_samples"] == 16
        for mine, theirs in zip(report["layers"], modifier.report.layers, strict=True):
            assert mine["index"] == theirs.index
            assert mine["score"] == pytest.approx(theirs.score, rel=1e-9)
            assert mine["nmse"] == pytest.approx(theirs.nmse, rel=1e-9)
        for index in linearized(model):
            linear = model.model.layers[index].self_attn.linear
            name = f"model.layers.{index}.self_attn.linear"
            for part, expected in (("weight", linear.weight), ("bias", linear.bias)):
                difference = answer["maps"][f"{name}.{part}"] - expected
                assert difference.abs().max() / expected.abs().max() < 1e-9
    first, second = (answer["maps"] for answer in answers(tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = load(tmp_path / "out")
    assert linearized(saved) == linearized(model)


def test_a_quantizer_follows(tmp_path: Path, start: Start) -> None:
    result = start(num_layers=2, quantize=True, dtype="float32")
    assert result.returncode == 0, result.stderr
    model = load(tmp_path / "out")
    for index in linearized(model):
        assert (
            model.model.layers[index].self_attn.linear.quantization_scheme is not None
        )
    assert len(linearized(model)) == 2


def test_statistics_are_saved_by_their_owners(
    llama: Path, tmp_path: Path, start: Start
) -> None:
    """One process can then try what it likes."""
    folder = tmp_path / "statistics"
    result = start(num_layers=2, save_statistics=str(folder))
    assert result.returncode == 0, result.stderr
    store = StatisticsStore.open(folder)
    assert all(index in store for index in range(4))
    fit, heldout = store.load(3, "model.layers.3.self_attn")
    assert fit.num_tokens == 16 * 64
    assert heldout is None
    model = load(llama).to(torch.float64)
    modifier = NBLModifier(num_layers=2, statistics=str(folder))
    compress(model, [modifier], None)
    expected = NBLModifier(num_layers=2)
    compress(load(llama).to(torch.float64), [expected], token_rows(16))
    assert modifier.report is not None
    assert expected.report is not None
    assert modifier.report.selected_layers == expected.report.selected_layers
    limited = NBLModifier(max_nmse=1.0, statistics=str(folder))
    model = load(llama).to(torch.float64)
    with pytest.raises(ValueError, match="without held-out tokens"):
        compress(model, [limited], None)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("nan", "process 1 of 2: NonFiniteError: model.layers.2.self_attn: "),
        ("solve", "process 1 of 2: ValueError: model.layers.1.self_attn: no solution"),
        ("same", "processes 0 and 1 calibrate on the same samples"),
        ("crash", "exitcode  : 7"),
    ],
)
def test_a_failed_process_ends_the_run(
    tmp_path: Path, start: Start, sabotage: str, message: str
) -> None:
    """Clearly, and long before any timeout of the process group."""
    started_at = time.monotonic()
    result = start(num_layers=2, sabotage=sabotage)
    assert time.monotonic() - started_at < TIMEOUT_SECONDS
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("windows", "greedy, refit and distill_epochs run the model"),
        ("losses", "losses run the model"),
    ],
)
def test_what_one_process_cannot_tell_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch, asked: str, message: str
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    needs = Needs(
        kind="attention",
        input="residual",
        heldout_nmse=False,
        losses=asked == "losses",
        windows=asked == "windows",
    )
    with pytest.raises(NotImplementedError, match=message):
        open_sources(load(llama), [], {}, needs, statistics=None, save_statistics=None)
