# SPDX-License-Identifier: Apache-2.0
"""Processes that each hold one model in one engine."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from .roofline import Machine
from .timing import Timing

__all__ = ["Engine", "EngineError", "Job", "Loaded", "tail"]

_LOG_TAIL_LINES = 25


class EngineError(RuntimeError):
    """Raised when an engine cannot do one measurement, and lives on."""


@dataclasses.dataclass(frozen=True)
class Job:
    """
    What a worker is to load, and how.

    :param model: directory or Hugging Face name
    :param engine: what runs it
    :param dtype: such as ``bfloat16``
    :param random_weights: whether to make weights up instead of reading them
    :param attention: implementation in transformers, ``eager`` or ``sdpa``
    :param max_model_len: longest sequence
    :param max_batch: sequences at once
    :param vocab_size: token ids to draw prompts from
    :param has_attention: whether any layer has attention
    :param weight_bytes: working set over which bandwidth is measured
    :param eager: vLLM without compilation and CUDA graphs
    :param kv_cache_gib: size of vLLM's KV cache on a CPU; None: VLLM_CPU_KVCACHE_SPACE,
        or 1
    :param memory_fraction: part of an accelerator's memory that vLLM may use
    :param engine_args: further arguments of ``vllm.LLM``
    """

    model: str
    engine: Literal["vllm", "transformers"]
    dtype: str
    random_weights: bool
    attention: str
    max_model_len: int
    max_batch: int
    vocab_size: int
    has_attention: bool
    weight_bytes: float
    eager: bool
    kv_cache_gib: int | None
    memory_fraction: float
    engine_args: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """
    What a worker has loaded.

    :param architecture: class of the model in the engine
    :param kv_cache_tokens: tokens that fit in the KV cache; None without a limit
    :param block_size: tokens per block of it, or None
    :param tokens_per_pass: tokens per forward pass at most, or None
    :param available_bytes: memory left, or None if unknown
    :param device: name of the processor or accelerator
    :param threads: torch's, on the CPU
    :param peaks: of the machine, measured in this process
    :param load_seconds: time to start
    """

    architecture: str
    kv_cache_tokens: int | None
    block_size: int | None
    tokens_per_pass: int | None
    available_bytes: int | None
    device: str
    threads: int
    peaks: Machine
    load_seconds: float


class Engine:
    """
    A worker process, from loading to :meth:`close`; a context manager.

    Requests and answers go through pipes of their own, since engines log to standard
    output.

    :param job: what to load
    :param show_log: whether the engine's log goes to the terminal
    :raises RuntimeError: if it cannot be loaded; the message ends with its log
    """

    def __init__(self, job: Job, *, show_log: bool = False) -> None:
        self._model = job.model
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)), "utf-8")
        self._log = folder / "log"
        their_requests, requests = os.pipe()
        answers, their_answers = os.pipe()
        theirs = (their_requests, their_answers)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "nbl_modifier.benchmark.worker"),
                    *(str(folder / "job.json"), *map(str, theirs)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=None if show_log else log,
                stderr=None if show_log else log,
                pass_fds=theirs,
            )
        for descriptor in theirs:
            os.close(descriptor)
        self._requests = os.fdopen(requests, "w")
        self._answers = os.fdopen(answers)
        answer = self._receive()
        answer["peaks"] = Machine(**answer["peaks"])
        self.loaded = Loaded(**answer)

    def measure(self, *, batch: int, context: int, generate: int, seed: int) -> Timing:
        """
        Read ``batch`` random prompts of ``context`` tokens, then generate.

        :param generate: tokens to generate per sequence
        :param seed: of the prompts; a new one for each measurement
        :raises EngineError: if the engine cannot, for example for lack of memory
        :raises RuntimeError: if it died; the message ends with its log
        """
        cell = {"batch": batch, "context": context, "generate": generate, "seed": seed}
        self._requests.write(json.dumps(cell) + "\n")
        self._requests.flush()
        answer = self._receive()
        if "error" in answer:
            raise EngineError(answer["error"].strip().splitlines()[0])
        return Timing(**answer)

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        self._requests.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        message = (
            f"model {self._model}: the engine failed with exit code {code}. --debug "
            f"shows its whole log, which ends with:\n{tail(self._log)}"
        )
        self.close()
        raise RuntimeError(message)


def tail(log: Path) -> str:
    """Return the last lines of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])
