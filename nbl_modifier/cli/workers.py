# SPDX-License-Identifier: Apache-2.0
"""Processes with one vLLM engine each: when one ends, its memory is free again."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def require_vllm() -> None:
    """
    Check that vLLM is installed here.

    :raises ImportError: if it is not
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed here. Run this in the environment that serves: "
            "pip install vllm nbl-modifier."
        )


def run_worker(
    name: str, model: str, job: dict[str, Any], *, debug: bool, progress: bool = False
) -> dict[str, Any]:
    """
    Run ``nbl_modifier.cli.<name>`` and return its answer.

    An answer is whole, so it counts however the process ends: vLLM's threads may abort
    an interpreter that is on its way out.

    :param name: module that takes the job as JSON and the path of its answer
    :param model: for messages
    :param job: JSON types
    :param debug: whether to show all that vLLM logs
    :param progress: whether to show its standard error, for progress bars
    :raises RuntimeError: if it gives none; the message ends with the tail of its log
    """
    command = [sys.executable, "-m", f"{__package__}.{name}"]
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.run(
                [*command, json.dumps(job), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=None if debug else file,
                stderr=None if debug or progress else file,
                check=False,
            )
        if not answer.exists():
            from nbl_modifier.benchmark.engines import tail

            raise RuntimeError(
                f"model {model}: vLLM failed with exit code {process.returncode}. "
                f"--debug shows its whole log, which ends with:\n{tail(log)}"
            )
        result: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        return result


def answer_job(main: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """
    Do the job that :func:`run_worker` gave this process, and answer it.

    :param main: takes the job, returns the answer; both JSON types
    """
    job, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(main(job)), encoding="utf-8")
    partial.replace(path)
