# SPDX-License-Identifier: Apache-2.0
"""
One model in one engine: the process that :class:`~.engines.Engine` starts.

    python -m nbl_modifier.benchmark.worker JOB.json READ_FD WRITE_FD

``JOB.json`` is a :class:`~.engines.Job`. The first line out says what was loaded. Then
one JSON line in, one line out: a cell (``batch``, ``context``, ``generate``, ``seed``)
is answered by a :class:`~.timing.Timing`, or by ``error``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from .timing import Timing


class Driver(Protocol):
    """One engine with one model in it."""

    device: str

    def describe(self) -> dict[str, Any]:
        """Return the fields of ``engines.Loaded`` that the engine knows."""
        ...

    def measure(self, batch: int, context: int, generate: int, seed: int) -> Timing:
        """Read ``batch`` random prompts, then generate; return how long it took."""
        ...


def main(job: dict[str, Any], requests: Any, answers: Any) -> None:
    """
    Load, say so, and answer until ``requests`` ends.

    :param job: fields of ``engines.Job``
    :param requests: text file to read lines from
    :param answers: text file to write lines to
    """

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    started_at = time.perf_counter()
    driver = _load(job)
    seconds = time.perf_counter() - started_at
    send({**driver.describe(), **_peaks(driver, job), "load_seconds": seconds})
    for line in requests:
        cell = json.loads(line)
        try:
            send(dataclasses.asdict(driver.measure(**cell)))
        except (RuntimeError, ValueError, MemoryError) as err:  # out of memory, mostly
            send({"error": f"{type(err).__name__}: {err}"})


def _load(job: dict[str, Any]) -> Driver:
    if job["engine"] == "vllm":
        from .vllm_driver import VLLMDriver

        return VLLMDriver(job)
    from .transformers_driver import TransformersDriver

    return TransformersDriver(job)


def _peaks(driver: Driver, job: dict[str, Any]) -> dict[str, Any]:
    """Return the machine's, measured where the model runs, with its threads."""
    import torch

    from .peaks import measure_peaks

    peaks = measure_peaks(
        driver.device, getattr(torch, job["dtype"]), job["weight_bytes"]
    )
    return {"peaks": dataclasses.asdict(peaks), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    _job_file, _read, _write = sys.argv[1:]
    with os.fdopen(int(_read)) as _requests, os.fdopen(int(_write), "w") as _answers:
        main(json.loads(Path(_job_file).read_text("utf-8")), _requests, _answers)
