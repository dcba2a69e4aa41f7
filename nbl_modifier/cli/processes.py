# SPDX-License-Identifier: Apache-2.0
"""A command that torchrun has started several times."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["part_of", "process_group", "rank", "share_of", "world_size"]


def world_size() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """
    Join the other processes, if there are any; only the first one prints.

    NCCL where there are GPUs, one for each process of a node; gloo elsewhere.
    """
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        with contextlib.ExitStack() as stack:
            if rank() > 0:
                silence = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield
    finally:
        dist.destroy_process_group()


def part_of(rows: Dataset) -> Dataset:
    """
    Return this process's share of the rows.

    :param rows: the same in all processes
    """
    return rows if world_size() == 1 else rows.shard(world_size(), rank())


def share_of(count: int, available: int) -> int:
    """
    Return how many samples this process draws.

    :param count: for all processes together
    :param available: rows that this process has
    """
    each, left = divmod(count, world_size())
    return min(each + (rank() < left), available)
