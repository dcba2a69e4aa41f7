# SPDX-License-Identifier: Apache-2.0
"""The protocol of an engine's process, around a driver that needs no model."""

import dataclasses
import multiprocessing
import threading
from typing import Any

import pytest

from nbl_modifier.benchmark import peaks, serving
from nbl_modifier.benchmark.roofline import Machine
from nbl_modifier.benchmark.serving import EngineError, Loaded, serve
from nbl_modifier.benchmark.timing import Timing
from tests.benchmark.benchmarks import make_loaded
from tests.benchmark.jobs import make_job


class Driver:
    """Answers by what it was asked, or fails as engines do."""

    device = "cpu"

    def describe(self) -> dict[str, Any]:
        fields = dataclasses.asdict(make_loaded())
        for known_elsewhere in ("peaks", "threads", "load_seconds"):
            del fields[known_elsewhere]
        return fields

    def measure(self, batch: int, context: int, generate: int, seed: int) -> Timing:
        if batch > 2:
            raise MemoryError("no room for 3\nand a long story")
        return Timing(float(batch), float(context), generate, float(seed), None)


def test_engine_answers_until_the_connection_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fastest = Machine(1.0, 2.0)
    monkeypatch.setattr(serving, "_load", lambda job: Driver())
    monkeypatch.setattr(peaks, "measure_peaks", lambda *_: fastest)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(make_job(), theirs))
    thread.start()
    loaded = ours.recv()
    assert isinstance(loaded, Loaded)
    assert loaded.peaks == fastest
    assert loaded.load_seconds >= 0
    ours.send({"batch": 1, "context": 2, "generate": 3, "seed": 4})
    assert ours.recv() == Timing(1.0, 2.0, 3, 4.0, None)
    ours.send({"batch": 3, "context": 2, "generate": 3, "seed": 4})
    error = ours.recv()
    assert isinstance(error, EngineError)
    assert str(error) == "MemoryError: no room for 3"  # and it lives on
    ours.send({"batch": 2, "context": 2, "generate": 3, "seed": 4})
    assert ours.recv().prefill_seconds == 2.0
    ours.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
