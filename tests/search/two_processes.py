# SPDX-License-Identifier: Apache-2.0
"""Searches in one process, and in two of gloo that have half of the windows each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Cost, Progress
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.layer_statistics.windows import Windows
from nbl_modifier.search.find import SearchOptions, find_replacements
from nbl_modifier.search.outcome import Outcome
from tests.calibration.observed import observed

__all__ = ["Found", "Job", "in_two_processes", "search"]

# Many times what a search takes; gloo itself waits half an hour.
_PATIENCE = timedelta(seconds=60)


@dataclass(frozen=True)
class Job:
    """
    A search.

    :param folder: of the model
    :param dtype: to run it in
    :param tokens: ``[window, token]`` ids, of all processes
    :param held_out: numbers of the windows that are held out
    :param options: of the search
    :param fails: where the last process fails: in a ``forward`` or ``backward`` pass
    """

    folder: Path
    dtype: torch.dtype
    tokens: list[list[int]]
    held_out: tuple[int, ...]
    options: SearchOptions
    fails: str | None = None


@dataclass(frozen=True)
class Found:
    """
    What one process found.

    :param outcome: of the search; None if it failed
    :param norms: of the model after it, by name
    :param windows: how often a layer ran over a window
    :param error: with which it failed, and its type's name in front
    """

    outcome: Outcome | None
    norms: dict[str, Tensor]
    windows: int
    error: str = ""


def search(job: Job) -> Found:
    """Do a job in this process, or this process's part of it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    each = len(job.tokens) // size
    mine = range(rank * each, (rank + 1) * each)
    held_out = [i - mine.start for i in job.held_out if i in mine]
    found = observed(job.folder, "normalized")
    model = found.model.to(job.dtype)
    solver = LayerSolver(layers=found.layers)
    keep = len(found.layers.modules)

    def calibration(streams: Mapping[int, Tensor] | None) -> Calibration:
        board = Leaderboard(job.options.criterion, keep)
        return Calibration(solver, board, held_out=held_out, streams=streams)

    progress = Progress(Cost(keep, each, 0, []))
    architecture = found.layers.architecture
    passes = Passes(
        PartialForward(model, architecture, progress),
        architecture,
        Windows([{"input_ids": torch.tensor([job.tokens[i]])} for i in mine]),
        calibration,
    )
    measured = passes.estimate(range(keep))
    if job.fails is not None and rank == size - 1:
        _break(model, job.fails)
    try:
        outcome = find_replacements(measured, job.options, passes, held_out)
    except Exception as err:  # noqa: BLE001  the test looks at it
        return Found(None, {}, 0, f"{type(err).__name__}: {err}")
    norms = {n: p for n, p in model.state_dict().items() if "norm" in n}
    return Found(outcome, norms, round(progress.passes * each * keep))


def _break(model: Any, where: str) -> None:
    def fail(*_args: Any) -> None:
        raise ArithmeticError("on purpose")

    layer = model.model.layers[-1].mlp
    if where == "forward":
        layer.register_forward_hook(fail)
    else:
        layer.register_full_backward_hook(fail)


def in_two_processes(jobs: Mapping[str, Job], folder: Path) -> dict[str, list[Found]]:
    """
    Do jobs one after the other in two processes.

    :param jobs: by name
    :param folder: for their files
    :return: what each process found, by name of the job
    """
    torch.save(dict(jobs), folder / "jobs.pt")
    mp.spawn(_process, args=(folder,), nprocs=2)
    found = [_read(folder / f"found{rank}.pt") for rank in (0, 1)]
    return {name: [each[name] for each in found] for name in jobs}


def _read(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = torch.load(path, weights_only=False)
    return read


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=_PATIENCE
    )
    try:
        jobs = _read(folder / "jobs.pt")
        found = {name: search(job) for name, job in jobs.items()}
        torch.save(found, folder / f"found{rank}.pt")
    finally:
        dist.destroy_process_group()
