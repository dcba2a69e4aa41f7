# SPDX-License-Identifier: Apache-2.0
"""What runs in the processes of ``test_worker.py``: each ends in its own way."""

import os
import signal
import time
from typing import Any

from nbl_modifier.worker import Connection


def double(job: Any, connection: Connection) -> None:
    """Answer twice the number; die before or after that, by the signal in the job."""
    os.write(1, f"loading {job['model']}\n".encode())
    if job.get("before"):
        os.kill(os.getpid(), job["before"])
    connection.send(2 * job["number"])
    if job.get("after"):
        os.kill(os.getpid(), job["after"])


def fail(job: Any, connection: Connection) -> None:
    """Raise, after more lines than a message shows."""
    for number in range(100):
        os.write(2, f"line {number}\n".encode())
    raise ValueError(f"no such model: {job}")


def echo(job: Any, connection: Connection) -> None:
    """Answer each request by the job and the request, until there are no more."""
    connection.send(job)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request == "die":
            os._exit(7)
        connection.send((job, request))


def leave_a_child(job: Any, connection: Connection) -> None:
    """Die, and leave a process behind that holds the pipe open."""
    if os.fork() == 0:
        time.sleep(job)
        os._exit(0)
    os._exit(3)


def hang(job: Any, connection: Connection) -> None:
    """Say who this is, and never end by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if job == "deaf" else signal.SIG_DFL)
    connection.send(os.getpid())
    time.sleep(600)
