"""
Several processes: each sees its own part of the data, together they find what one
process would.

The statistics of each layer are added up in one process, its owner, which solves it.
Owners take turns, so that as many layers as there are processes are solved at once. No
process enters a collective operation before all have said that they are well: one that
fails takes the others with it, instead of leaving them to wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from .moments import HeldoutStatistics, LayerStatistics

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """The processes of this run; one if ``torch.distributed`` is not initialized."""

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.size: int = dist.get_world_size() if initialized else 1
        self.rank: int = dist.get_rank() if initialized else 0

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return self.size == 1

    def owner(self, position: int) -> int:
        """
        Return the process that solves a layer.

        :param position: of the layer among those to solve
        """
        return position % self.size

    def check(self, failure: BaseException | None) -> None:
        """
        Raise in every process if it has failed in any.

        :param failure: what went wrong in this one, or None
        :raises Exception: ``failure`` itself, in the process that failed
        :raises RuntimeError: in the others, naming the process and its failure
        """
        if self.alone:
            if failure is not None:
                raise failure
            return
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        found = self.gather(mine)
        if failure is not None:
            raise failure
        failed = {rank: text for rank, text in enumerate(found) if text is not None}
        if failed:
            rank, text = min(failed.items())
            raise RuntimeError(
                f"calibration failed in process {rank} of {self.size}: {text}"
            )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """
        Let all processes raise what one of them does inside, see :meth:`check`.

        What runs inside must not ask the other processes for anything.

        :raises Exception: as :meth:`check`
        """
        failure = None
        try:
            yield
        except Exception as err:
            if self.alone:
                raise
            failure = err
        self.check(failure)

    def gather(self, mine: T) -> list[T]:
        """
        Return what every process has, in order of their ranks.

        :param mine: anything that can be pickled
        """
        if self.alone:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def merge(self, mine: Mapping[int, T]) -> dict[int, T]:
        """Return the entries of all processes' dictionaries, keys in order."""
        merged: dict[int, T] = {}
        for part in self.gather(dict(mine)):
            merged |= part
        return {key: merged[key] for key in sorted(merged)}

    def send(self, value: T | None, source: int) -> T:
        """
        Return ``value`` of the process ``source`` in all of them.

        :param value: anything that can be pickled; what other processes pass is ignored
        :param source: a rank
        """
        held: list[Any] = [value if self.rank == source else None]
        if not self.alone:
            dist.broadcast_object_list(held, src=source)
        received: T = held[0]
        return received

    def add_up(self, tensor: Tensor, owner: int | None = None) -> None:
        """
        Replace a tensor by its sum over all processes, in place.

        :param tensor: ``[...]``, contiguous, of one shape and dtype in all processes
        :param owner: rank of the only process that needs the sum; in the others the
            tensor is left undefined. None: all do
        """
        if self.alone:
            return
        if owner is None:
            dist.all_reduce(tensor)
        else:
            dist.reduce(tensor, dst=owner)

    def share(self, tensor: Tensor, owner: int) -> None:
        """
        Replace a tensor by the owner's, in place.

        :param tensor: ``[...]``, contiguous, of one shape and dtype in all processes
        :param owner: a rank
        """
        if not self.alone:
            dist.broadcast(tensor, src=owner)

    def pool(self, statistics: LayerStatistics | HeldoutStatistics, owner: int) -> None:
        """
        Add up the statistics of all processes, in the owner's.

        :param statistics: of one layer, the same in all processes; left undefined in
            those that do not own it
        :param owner: rank of the one that does
        """
        if not self.alone:
            statistics.pool_(self.add_up, partial(self.add_up, owner=owner))
