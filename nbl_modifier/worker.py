# SPDX-License-Identifier: Apache-2.0
"""
A process of its own for what takes memory: when it ends, all of that is free again.

The process is spawned, not forked, and so knows nothing of what this one has loaded.
What it prints goes to a log, of which an error shows the end. Standard library only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Connection", "Worker", "answer_of"]

_LOG_TAIL_LINES = 25
# How often an answer that does not come is a reason to see whether the process lives.
_POLL_SECONDS = 1.0
# vLLM needs some to give back what it holds.
_PATIENCE_SECONDS = 30.0


class Worker:
    """
    A process, from its start to :meth:`close`; a context manager.

    :param main: what runs in it, called with ``job`` and the connection that it answers
        by; a function at the top of a module, so that the process can import it
    :param job: what to do; pickled
    :param subject: for messages: who fails if the process does
    :param show_output: whether its standard output goes to the terminal, not to the log
    :param show_errors: the same for its standard error, where progress bars are
    """

    def __init__(
        self,
        main: Callable[[Any, Connection], None],
        job: Any,
        *,
        subject: str,
        show_output: bool = False,
        show_errors: bool = False,
    ) -> None:
        self._subject = subject
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        self._log.touch()
        hidden = [1] * (not show_output) + [2] * (not show_errors)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (main, job, theirs, str(self._log), hidden)
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """
        Wait for the next answer and return it.

        :raises RuntimeError: if the process ends without one; the message ends with
            the tail of its log
        """
        # Children of the process may hold its end of the pipe open when it is gone.
        while not self._connection.poll(_POLL_SECONDS):
            if not self._process.is_alive() and not self._connection.poll(0):
                raise self._failure()
        try:
            return self._connection.recv()
        except (EOFError, OSError) as err:
            raise self._failure() from err

    def ask(self, request: Any) -> Any:
        """
        Send a request, wait for its answer and return that.

        :param request: what ``main`` receives; pickled
        :raises RuntimeError: if the process ends without an answer
        """
        try:
            self._connection.send(request)
        except OSError as err:
            raise self._failure() from err
        return self.receive()

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        self._connection.close()
        self._end()
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

    def _end(self) -> None:
        self._process.join(_PATIENCE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _failure(self) -> RuntimeError:
        self._end()
        message = (
            f"{self._subject} failed with {_in_words(self._process.exitcode)}. --debug "
            f"shows its whole log, which ends with:\n{_tail(self._log)}"
        )
        self.close()
        return RuntimeError(message)


def answer_of(
    main: Callable[[Any, Connection], None], job: Any, *, subject: str, **shown: bool
) -> Any:
    """
    Return the one answer of a process that ends then.

    An answer is whole, so it counts however the process ends: vLLM's threads may abort
    an interpreter that is on its way out.

    :param main: as in :class:`Worker`
    :param job: as in :class:`Worker`
    :param subject: as in :class:`Worker`
    :param shown: ``show_output``, ``show_errors``, as in :class:`Worker`
    :raises RuntimeError: if there is none; the message ends with the tail of its log
    """
    with Worker(main, job, subject=subject, **shown) as worker:
        return worker.receive()


def _run(
    main: Callable[[Any, Connection], None],
    job: Any,
    connection: Connection,
    log: str,
    hidden: list[int],
) -> None:
    """Be the process: its output goes to the log, that of its children too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in hidden:
        os.dup2(descriptor, stream)
    os.close(descriptor)
    main(job, connection)


def _in_words(code: int | None) -> str:
    """Return how a process ended: its exit code, and the signal that it was."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "a signal"
    hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return f"exit code {code} ({name}{hint})"


def _tail(log: Path) -> str:
    """Return the last lines of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])
