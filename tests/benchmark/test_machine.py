# SPDX-License-Identifier: Apache-2.0
"""What is known of the machine."""

from pathlib import Path

import pytest
import torch

from nbl_modifier.benchmark import machine
from nbl_modifier.benchmark.machine import (
    available_bytes,
    current_device,
    device_name,
    free_memory,
)


def test_free_memory_is_measured() -> None:
    free = free_memory()
    assert free is not None
    assert free > 1e8


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


def test_unknown_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise RuntimeError("torch failed with exit code 1")

    monkeypatch.setattr(machine, "answer_of", fail)
    assert free_memory() is None


def test_memory_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["MemTotal:  2048 kB", "MemAvailable:    1000 kB"]
    monkeypatch.setattr(machine, "_lines", lambda path: lines)
    assert available_bytes("cpu") == 1_024_000
    monkeypatch.setattr(machine, "_lines", lambda path: [])
    assert available_bytes("cpu") is None


def test_processor_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["processor : 0", "model name\t: Some CPU @ 2 GHz", "model name : other"]
    monkeypatch.setattr(machine, "_lines", lambda path: lines)
    assert device_name("cpu") == "Some CPU @ 2 GHz"


def test_files_that_are_not_there_have_no_lines(tmp_path: Path) -> None:
    assert machine._lines(str(tmp_path / "nothing")) == []
