"""
``vllm serve`` in a process of its own, for tests and for benchmarks/serving_load.py.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

START_SECONDS = 240
_LOG_LINES = 40


class ServerError(RuntimeError):
    """Raised when a server does not start, or does not end as it should."""


class Server:
    """
    A running ``vllm serve``.

    :param url: where it listens
    :param log: what it prints
    :param group: its process group
    """

    def __init__(self, url: str, log: Path, group: int) -> None:
        self.url = url
        self.log = log
        self.group = group
        #: from the start of the process until it answers
        self.start_seconds = 0.0
        #: the most memory resident by then in one of its processes
        self.start_peak_bytes = 0

    def metrics(self) -> str:
        """Return what Prometheus would read."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def kv_cache_tokens(self) -> int:
        """Return the capacity that ``/metrics`` shows, of each engine."""
        (tokens,) = set(re.findall(r'kv_cache_size_tokens="(\d+)"', self.metrics()))
        return int(tokens)

    def counter(self, name: str) -> float:
        """
        Return the sum of a metric over its labels.

        :raises ServerError: if there is none
        """
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.metrics(), re.MULTILINE)
        if not values:
            raise ServerError(f"/metrics has no {name}")
        return sum(map(float, values))

    def peak_bytes(self) -> int:
        """Return the most memory that was resident in one of its processes so far."""
        peaks = [0]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may have ended by now
                if os.getpgid(int(process.name)) == self.group:
                    status = (process / "status").read_text(encoding="utf-8")
                    peaks += map(int, re.findall(r"^VmHWM:\s*(\d+)", status, re.M))
        return 1024 * max(peaks)


@contextlib.contextmanager
def serving(
    executable: str,
    model: Path,
    log: Path,
    environment: Mapping[str, str],
    *arguments: str,
    patience: float = START_SECONDS,
) -> Iterator[Server]:
    """
    Run ``vllm serve`` on the loopback interface until it answers; end it afterwards.

    :param executable: ``vllm`` of the environment that serves
    :param model: checkpoint
    :param log: file for what it prints
    :param environment: all of its variables
    :param arguments: further ones of the command
    :param patience: seconds until it must answer
    :raises ServerError: if it ends before it answers, or takes too long to
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ("--host", "127.0.0.1", "--port", str(port))
    started_at = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [executable, "serve", str(model), *address, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log, process.pid)
        _wait_until_healthy(server, process, patience)
        server.start_seconds = time.monotonic() - started_at
        server.start_peak_bytes = server.peak_bytes()
        yield server
        process.send_signal(signal.SIGINT)
        if process.wait(60) != 0:
            raise ServerError(f"vllm serve ended with an error:\n{end_of(log)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_of(log: Path) -> str:
    """Return the last lines of a log, of each a part: vLLM dumps its state into one."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(line[:500] for line in text.splitlines()[-_LOG_LINES:])


def _wait_until_healthy(
    server: Server, process: subprocess.Popen[bytes], patience: float
) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended:\n{end_of(server.log)}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise ServerError(f"vllm serve does not answer:\n{end_of(server.log)}")
