"""Processes that take turns at solving layers, and failures that wait to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nbl_modifier.layer_statistics.moments import HeldoutStatistics, LayerStatistics
from nbl_modifier.layer_statistics.processes import Ranks

from .observer import Sums

__all__ = ["Turns"]


class Turns:
    """
    Whose turn it is to solve a layer, and what went wrong in this process.

    An error that was raised at once would leave the other processes waiting for this
    one, so it is kept until they can be told. If there are none, it is raised at once.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self._failure: Exception | None = None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Keep an error until :meth:`check`, or raise it if this process is alone."""
        try:
            yield
        except Exception as err:
            if self.ranks.alone:
                raise
            self._failure = self._failure or err

    def guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """
        Return a hook that does nothing after a failure that is yet to be told.

        :param hook: what may fail
        """

        def run(*args: Any, **kwargs: Any) -> None:
            if self._failure is None:
                with self.failing():
                    hook(*args, **kwargs)

        return run

    def is_mine(self, position: int) -> bool:
        """
        Return whether this process solves a layer.

        :param position: of the layer among those that are measured
        """
        return self.ranks.owner(position) == self.ranks.rank

    def all_have_one(self, position: int) -> bool:
        """
        Return whether every process has a layer to solve once this one is assigned.

        :param position: of the layer among those that are measured
        """
        return (position + 1) % self.ranks.size == 0

    def pool(
        self,
        position: int,
        name: str,
        sums: Sums,
    ) -> Sums | None:
        """
        Add up the sums of all processes in the one that solves the layer.

        :param position: of the layer among those that are measured
        :param name: of the layer, for messages
        :param sums: of this process; None of what saw no batch
        :return: the sums of all, left undefined where the layer is not solved; None if
            there is nothing to solve, for which all have to be there
        :raises Exception: in all processes, if one of them failed, or saw no data
        """
        found = [each for each in sums if each is not None]
        if not found and self.ranks.alone:
            return None  # reported when calibration ends
        if not found and self._failure is None:
            self._failure = RuntimeError(f"{name}: has seen no data")
        self.check()
        sums = self._completed(*sums, found[0].form)
        for each in sums:
            if each is not None:
                self.ranks.pool(each, self.ranks.owner(position))
        return sums

    def _completed(
        self,
        fitted: LayerStatistics | None,
        held_out: LayerStatistics | HeldoutStatistics | None,
        form: tuple[str, int, bool, torch.device],
    ) -> Sums:
        """
        Return the sums with empty ones where only other processes have any.

        Of a few batches a process may hold out none, or all.
        """
        if self.ranks.alone:
            return fitted, held_out
        if fitted is None:
            fitted = LayerStatistics(*form)
        kind = None if held_out is None else type(held_out)
        kinds = [each for each in self.ranks.gather(kind) if each is not None]
        if held_out is None and kinds:
            held_out = kinds[0](*form)
        return fitted, held_out

    def check(self) -> None:
        """
        Tell the other processes what went wrong in this one, and hear of theirs.

        :raises Exception: what failed here, see :meth:`Ranks.check`
        :raises RuntimeError: if another process has failed
        """
        self.ranks.check(self._failure)
