# SPDX-License-Identifier: Apache-2.0
"""Processes of their own: their answers, and what is said where there is none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier import worker
from nbl_modifier.worker import Worker, answer_of
from tests import worker_mains

ROOT = Path(__file__).parents[1]
# Starts a worker that never answers twice, says its number, and is interrupted.
WAITING = """
import signal

from nbl_modifier.worker import Worker
from tests import worker_mains

if __name__ == "__main__":
    # Ignored where a shell has started the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Worker(worker_mains.hang, "", subject="x") as process:
        print(process.receive(), flush=True)
        process.receive()
"""


def run(**job: Any) -> Any:
    job = {"model": "tiny", "number": 21, **job}
    return answer_of(worker_mains.double, job, subject="model tiny: vLLM")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


@pytest.mark.parametrize("after", [None, signal.SIGABRT, signal.SIGKILL])
def test_answer_counts_however_the_process_ends(after: int | None) -> None:
    assert run(after=after) == 42


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (signal.SIGABRT, r"exit code -6 \(SIGABRT\)"),
        (signal.SIGKILL, r"exit code -9 \(SIGKILL, perhaps for lack of memory\)"),
    ],
)
def test_death_without_answer_shows_the_log(before: int, words: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"model tiny: vLLM failed with {words}"
    ) as e:
        run(before=before)
    assert "--debug shows its whole log" in str(e.value)
    assert str(e.value).endswith("loading tiny")


def test_error_is_the_end_of_the_log() -> None:
    with pytest.raises(RuntimeError, match="x failed with exit code 1") as caught:
        answer_of(worker_mains.fail, "y", subject="x")
    message = str(caught.value)
    assert message.endswith("ValueError: no such model: y")
    assert "line 50" not in message
    assert len(message.splitlines()) == 1 + 25


def test_nothing_is_printed_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    run()
    assert capfd.readouterr() == ("", "")
    job = {"model": "tiny", "number": 1}
    assert answer_of(worker_mains.double, job, subject="", show_output=True) == 2
    assert capfd.readouterr() == ("loading tiny\n", "")


def test_requests_are_answered_in_turn() -> None:
    with (
        Worker(worker_mains.echo, "a", subject="a") as first,
        Worker(worker_mains.echo, "b", subject="b") as second,
    ):
        assert [first.receive(), second.receive()] == ["a", "b"]
        for request in ({"batch": 1}, [1.5, None]):
            assert second.ask(request) == ("b", request)
            assert first.ask(request) == ("a", request)
        with pytest.raises(RuntimeError, match="a failed with exit code 7"):
            first.ask("die")
        assert second.ask("still there") == ("b", "still there")


def test_death_is_noticed_though_a_child_lives_on() -> None:
    """Engines have processes of their own, which inherit the pipe."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="x failed with exit code 3"):
        answer_of(worker_mains.leave_a_child, 20.0, subject="x")
    assert time.monotonic() - start < 15


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PATIENCE_SECONDS", 0.5)
    pid = answer_of(worker_mains.hang, "deaf", subject="x")
    assert not is_running(pid)


def test_interrupt_ends_both() -> None:
    """As by Ctrl-C, which the terminal sends to the whole group."""
    command = [sys.executable, "-c", WAITING]
    script = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert script.stdout is not None
    pid = int(script.stdout.readline())
    assert is_running(pid)
    os.killpg(script.pid, signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode in (-signal.SIGINT, 1)
    assert "KeyboardInterrupt" in errors
    assert not is_running(pid)
