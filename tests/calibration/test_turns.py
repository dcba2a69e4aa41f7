# SPDX-License-Identifier: Apache-2.0
"""Processes take turns; what fails in one is told to all, at the next occasion."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nbl_modifier.calibration.turns import Turns
from nbl_modifier.layer_statistics.moments import HeldoutStatistics, LayerStatistics

WIDTH = 4


def sums(seed: int = 0) -> LayerStatistics:
    statistics = LayerStatistics("layer", WIDTH, False, torch.device("cpu"))
    rows = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    statistics.update(rows, rows, rows, None)
    return statistics


def held_out() -> HeldoutStatistics:
    statistics = HeldoutStatistics("layer", WIDTH, False, torch.device("cpu"))
    rows = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(5))
    statistics.update(rows, rows, rows, None)
    return statistics


def test_alone_a_failure_is_raised_at_once() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="on purpose"), turns.failing():
        raise ValueError("on purpose")
    turns.check()
    assert all(turns.is_mine(i) and turns.all_have_one(i) for i in range(3))


def test_alone_a_layer_without_data_is_left_out() -> None:
    turns = Turns()
    assert turns.pool(0, "layer", (None, None)) is None
    mine = sums()
    assert turns.pool(0, "layer", (mine, None)) == (mine, None)


def _process(rank: int, folder: str) -> None:
    """One of two processes; what it asserts fails the test that started it."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        turns = Turns()
        assert [turns.is_mine(i) for i in range(4)] == [i % 2 == rank for i in range(4)]
        assert [turns.all_have_one(i) for i in range(4)] == [False, True] * 2
        mine = sums(seed=rank)
        assert turns.pool(1, "layer", (mine, None)) == (mine, None)
        if rank == 1:
            assert mine.num_tokens == 12
        # what only the other one holds out, or fits on, counts here, too
        apart = (sums(), None) if rank == 1 else (None, held_out())
        pooled = turns.pool(1, "layer", apart)
        assert pooled is not None
        if rank == 1:
            fitted, theirs = pooled
            assert isinstance(theirs, HeldoutStatistics)
            assert fitted is not None
            assert (fitted.num_tokens, theirs.finalize().num_tokens) == (6, 6)
        seen: list[int] = []
        hook = turns.guarded(seen.append)
        hook(1)
        if rank == 0:
            with turns.failing():
                raise ValueError("on purpose")
        hook(2)
        assert seen == ([1] if rank == 0 else [1, 2])
        # both get here, and neither waits for the other
        told = ValueError if rank == 0 else RuntimeError
        with pytest.raises(told, match="on purpose"):
            turns.pool(2, "layer", (sums(), None))
        without = Turns()
        what = (None, None) if rank == 1 else (sums(), None)
        with pytest.raises(RuntimeError, match="layer: has seen no data"):
            without.pool(0, "layer", what)
    finally:
        dist.destroy_process_group()


def test_two_processes_tell_each_other() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, args=(str(Path(folder)),), nprocs=2)
