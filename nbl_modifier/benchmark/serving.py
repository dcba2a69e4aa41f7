# SPDX-License-Identifier: Apache-2.0
"""One model in one engine: what runs in the process of :class:`~.engines.Engine`."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal, Protocol

from nbl_modifier.worker import Connection

from .roofline import Machine
from .timing import Timing

__all__ = ["Driver", "EngineError", "Job", "Loaded", "serve"]


class EngineError(RuntimeError):
    """Raised when an engine cannot do one measurement, and lives on."""


@dataclasses.dataclass(frozen=True)
class Job:
    """
    What an engine is to load, and how.

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
    What an engine has loaded.

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


class Driver(Protocol):
    """One engine with one model in it."""

    device: str

    def describe(self) -> dict[str, Any]:
        """Return the fields of :class:`Loaded` that the engine knows."""
        ...

    def measure(self, batch: int, context: int, generate: int, seed: int) -> Timing:
        """Read ``batch`` random prompts, then generate; return how long it took."""
        ...


def serve(job: Job, connection: Connection) -> None:
    """
    Load, say so, and answer until the connection ends.

    :param job: what to load
    :param connection: the first answer is what was :class:`Loaded`; then each request,
        keywords of :meth:`Driver.measure`, is answered by a :class:`~.timing.Timing`,
        or by an :class:`EngineError`
    """
    started_at = time.perf_counter()
    driver = _load(job)
    seconds = time.perf_counter() - started_at
    connection.send(
        Loaded(**driver.describe(), **_peaks(driver, job), load_seconds=seconds)
    )
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        answer: Timing | EngineError
        try:
            answer = driver.measure(**cell)
        except (RuntimeError, ValueError, MemoryError) as err:  # out of memory, mostly
            first_line = str(err).strip().partition("\n")[0]
            answer = EngineError(f"{type(err).__name__}: {first_line}")
        connection.send(answer)


def _load(job: Job) -> Driver:
    if job.engine == "vllm":
        from .vllm_driver import VLLMDriver

        return VLLMDriver(job)
    from .transformers_driver import TransformersDriver

    return TransformersDriver(job)


def _peaks(driver: Driver, job: Job) -> dict[str, Any]:
    """Return the machine's, measured where the model runs, with its threads."""
    import torch

    from .peaks import measure_peaks

    peaks = measure_peaks(driver.device, getattr(torch, job.dtype), job.weight_bytes)
    return {"peaks": peaks, "threads": torch.get_num_threads()}
