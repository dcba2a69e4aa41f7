# SPDX-License-Identifier: Apache-2.0
"""Processes that each hold one model in one engine."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from nbl_modifier.worker import Worker

from .serving import EngineError, Job, Loaded, serve
from .timing import Timing

__all__ = ["Engine"]


class Engine:
    """
    A model in a process of its own, from loading to :meth:`close`; a context manager.

    :param job: what to load
    :param show_log: whether the engine's log goes to the terminal
    :raises RuntimeError: if it cannot be loaded; the message ends with its log
    """

    def __init__(self, job: Job, *, show_log: bool = False) -> None:
        self._worker = Worker(
            serve,
            job,
            subject=f"model {job.model}: the engine",
            show_output=show_log,
            show_errors=show_log,
        )
        #: What the engine has loaded.
        self.loaded: Loaded = self._worker.receive()

    def measure(self, *, batch: int, context: int, generate: int, seed: int) -> Timing:
        """
        Read ``batch`` random prompts of ``context`` tokens, then generate.

        :param batch: sequences
        :param context: tokens of each prompt
        :param generate: tokens to generate per sequence
        :param seed: of the prompts; a new one for each measurement
        :raises EngineError: if the engine cannot, for example for lack of memory
        :raises RuntimeError: if it died; the message ends with its log
        """
        cell = {"batch": batch, "context": context, "generate": generate, "seed": seed}
        answer: Timing | EngineError = self._worker.ask(cell)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
