# SPDX-License-Identifier: Apache-2.0
"""Calibration in two gloo processes, against one process on the same data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_modifier import NBLModifier
from nbl_modifier.layer_statistics.store import StatisticsStore
from tests.tiny_llama import compress, linearized, load, token_rows
from tests.work import WindowCounter

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
        # before the first answer stands what imports log
        answer = next(line for line in launcher.stdout if line.startswith("{"))
        return Ended(**json.loads(answer))

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
    """One process can then try what it likes, on what it would have held out."""
    folder = tmp_path / "statistics"
    result = start(num_layers=2, statistics=str(folder))
    assert result.returncode == 0, result.stderr
    store = StatisticsStore.open(folder)
    assert all(index in store for index in range(4))
    fit, heldout = store.load(3, "model.layers.3.self_attn")
    assert heldout is not None
    assert (fit.num_tokens, heldout.num_tokens) == (12 * 64, 4 * 64)
    assert [w["input_ids"][0].tolist() for w in store.windows()] == [
        token_rows(16)["input_ids"][number] for number in (2, 6, 10, 14)
    ]
    model = load(llama).to(torch.float64)
    modifier = NBLModifier(num_layers=2, statistics=str(folder))
    compress(model, [modifier], None)
    expected = NBLModifier(num_layers=2)
    compress(load(llama).to(torch.float64), [expected], token_rows(16))
    assert modifier.report is not None
    assert expected.report is not None
    assert modifier.report.selected_layers == expected.report.selected_layers
    limited = NBLModifier(criterion="kl", max_nmse=5.0, statistics=str(folder))
    compress(load(llama).to(torch.float64), [limited], None)
    expected = NBLModifier(criterion="kl", max_nmse=5.0)
    compress(load(llama).to(torch.float64), [expected], token_rows(16))
    assert limited.report is not None
    assert expected.report is not None
    assert limited.report.selected_layers == expected.report.selected_layers
    for mine, theirs in zip(limited.report.layers, expected.report.layers, strict=True):
        assert mine.heldout_nmse == pytest.approx(theirs.heldout_nmse, rel=1e-9)
        assert mine.score == pytest.approx(theirs.score, rel=1e-7)


def test_two_processes_search_as_one_does(
    llama: Path, tmp_path: Path, start: Start
) -> None:
    """Greedily, with refit and distillation, and each runs the model half as often."""
    fields: dict[str, Any] = {
        "num_layers": 2,
        "criterion": "nmse",
        "selection": "greedy",
        "refit": True,
        "distill": {"epochs": 1, "rate": 0.01},
    }
    result = start(dtype="float32", **fields)
    assert result.returncode == 0, result.stderr
    modifier, model = NBLModifier(**fields), load(llama)
    counter = WindowCounter(model)
    compress(model, [modifier], token_rows(16))
    assert modifier.report is not None
    assert modifier.report.heldout is not None
    expected = modifier.report.heldout
    first, second = answers(tmp_path / "out")
    for answer in (first, second):
        report, heldout = answer["report"], answer["report"]["heldout"]
        assert report["selected_layers"] == modifier.report.selected_layers
        assert heldout["num_windows"] == expected.num_windows == 4
        for name in ("base", "replaced", "refitted"):
            assert heldout[name] == pytest.approx(getattr(expected, name), rel=1e-6)
        assert answer["windows"] == counter.windows / 2
        assert answer["passes"] == pytest.approx(counter.windows / (4 * 16))
        assert answer["stated"] == pytest.approx(answer["passes"], rel=0.25)
    assert first["report"]["heldout"] == second["report"]["heldout"]
    assert all(torch.equal(first["maps"][n], second["maps"][n]) for n in first["maps"])
    saved = load(tmp_path / "out")
    assert linearized(saved) == linearized(model)
    for name, expected_map in first["maps"].items():
        assert torch.equal(saved.state_dict()[name], expected_map)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("nan", "process 1 of 2: NonFiniteError: model.layers.2.self_attn: "),
        ("solve", "process 1 of 2: ValueError: model.layers.1.self_attn: no solution"),
        ("same", "processes 0 and 1 calibrate on the same samples"),
        # whichever process the agent misses first: the one that died, or the one that
        # lost it
        ("crash", "exitcode  : 7|Check the logs of the remote worker"),
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
    assert re.search(message, result.stderr)
    assert not (tmp_path / "out" / "config.json").exists()
