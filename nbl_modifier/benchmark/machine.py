# SPDX-License-Identifier: Apache-2.0
"""What the machine is called and how much memory it has left."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from nbl_modifier.worker import Connection, answer_of

__all__ = ["available_bytes", "current_device", "device_name", "free_memory"]


def free_memory() -> int | None:
    """
    Return what engines could allocate now, on the accelerator if there is one.

    Asked in a process of its own: on an accelerator the question itself takes memory,
    until the process that asked ends. None if it cannot be known.
    """
    try:
        free: int | None = answer_of(_tell_free, None, subject="torch")
    except RuntimeError:
        return None
    return free


def current_device() -> str:
    """
    Return the type of the accelerator as torch names it, ``cpu`` if there is none.

    A build of torch that could use one says which also where there is none.
    """
    import torch

    device = torch.accelerator.current_accelerator()
    if device is None or not torch.accelerator.is_available():
        return "cpu"
    return device.type


def device_name(device: str) -> str:
    """
    Return the model of the processor or of the accelerator.

    :param device: type as torch names it, such as ``cpu`` or ``cuda``
    """
    if device != "cpu":
        import torch

        module: Any = torch.get_device_module(device)
        return str(module.get_device_name(0))
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_bytes(device: str) -> int | None:
    """
    Return the memory that could be allocated now, or None if it cannot be known.

    :param device: type as torch names it
    """
    if device != "cpu":
        import torch

        free, _total = torch.get_device_module(device).mem_get_info()
        return int(free)
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _tell_free(_: None, connection: Connection) -> None:
    connection.send(available_bytes(current_device()))
