"""
One calibration pass over the attention layers: hooks in, solved linear maps out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from loguru import logger
from torch import Tensor, nn

from nbl_modifier import numerics
from nbl_modifier.criteria import Criterion
from nbl_modifier.layer_statistics.moments import LayerMoments
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.replacement.surgery import Replacement, execution_device

from .cost import Progress
from .leaderboard import Leaderboard
from .observer import BatchInFlight, LayerObserver, Sums
from .solver import LayerSolver, Measurement
from .turns import Turns

__all__ = ["Calibration"]


class Calibration:
    """
    Statistics of the layers in flight, and the results of those that are finished.

    An observer sums up what its hooks see, the process whose turn it is solves, and the
    leaderboard holds what came of it.

    :param solver: measures and fits one layer
    :param board: keeps the results
    :param held_out: numbers of the batches that are kept apart: not fitted on, they
        measure the error, if the solver is to
    :param streams: see :class:`LayerObserver`
    :param store: keeps the statistics of finished layers; those that it has already are
        read instead of measured
    :param log_level: of the line that each layer gets
    :param progress: told when a layer begins and what it took
    """

    def __init__(
        self,
        solver: LayerSolver,
        board: Leaderboard,
        *,
        held_out: Collection[int] = (),
        streams: Mapping[int, Tensor] | None = None,
        store: StatisticsStore | None = None,
        log_level: str = "INFO",
        progress: Progress | None = None,
    ) -> None:
        self._solver = solver
        self._layers = layers = solver.layers
        self._board = board
        # Kept apart only where something comes of it.
        apart = solver.measure_held_out or store is not None
        self._observer = LayerObserver(
            layers,
            held_out if apart else (),
            whole=store is not None,
            streams=streams,
        )
        self._store = store
        self._turns = Turns()
        self._log_level = log_level
        self._progress = progress
        self._stored = frozenset(
            i for i in layers.modules if store is not None and i in store
        )
        self._warned = False
        # Layers that this process is to solve; None: their statistics are stored.
        self._pending: dict[int, Sums | None] = {}
        self._collected = 0
        self._started_at = time.perf_counter()

    @property
    def measured(self) -> dict[int, Measurement]:
        """How linear the finished layers are, by decoder layer index."""
        return self._board.measured

    @property
    def replacements(self) -> dict[int, Replacement]:
        """Those of the best of them, by decoder layer index."""
        return self._board.replacements

    @property
    def seconds(self) -> float:
        """Wall time since calibration started."""
        return time.perf_counter() - self._started_at

    def scores(self, criterion: Criterion | None = None) -> dict[int, float]:
        """
        Return a criterion's value by layer index, of layers that have one.

        :param criterion: None: the one by which replacements are held
        """
        return self._board.scores(criterion)

    def watch(
        self,
        index: int,
        register: Callable[..., Any],
        in_flight: Callable[[], BatchInFlight],
    ) -> None:
        """
        Register the hooks that see one layer.

        :param index: the decoder layer
        :param register: given module, hook, its kind as in ``register_<kind>_hook`` and
            keyword arguments for that, registers it for who removes it again
        :param in_flight: called while a batch runs, says which
        """
        if index not in self._stored:
            self._observer.watch(index, register, in_flight, self._guarded)

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return the hook, made to start the clock and to stop after a failure."""
        guarded = self._turns.guarded(hook)

        def run(*args: Any, **kwargs: Any) -> None:
            if self._progress is not None:
                self._progress.begin()
            guarded(*args, **kwargs)

        return run

    def solve_finished(self, modules: Iterable[nn.Module]) -> None:
        """
        Solve the layers whose attention is among ``modules``, free their statistics.

        :param modules: what the pipeline has finished calibrating
        :raises ValueError: naming the layer, if it saw too few tokens
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        finished = set(map(id, modules))
        for index in sorted(self._layers.modules):
            if id(self._layers.attention(index)) in finished:
                # A pass over some of the layers has turns of its own.
                position, self._collected = self._collected, self._collected + 1
                self._collect(position, index)
                if self._turns.all_have_one(position):
                    self._solve_pending()

    def failing(self) -> AbstractContextManager[None]:
        """Keep what goes wrong inside until all processes can be told."""
        return self._turns.failing()

    def finish(self) -> None:
        """
        Solve what is left, and let every process know all results so far.

        :raises ValueError: as :meth:`solve_finished`
        :raises RuntimeError: if another process has failed
        """
        self._solve_pending()
        self._turns.check()
        self._board.merge(self._turns.ranks)

    def _collect(self, position: int, index: int) -> None:
        """Gather the statistics of one layer in the process that solves it."""
        sums = None
        if index not in self._stored:
            mine = self._observer.take(index)
            sums = self._turns.pool(position, self._layers.names[index], mine)
            if sums is None:
                return
        if self._turns.is_mine(position):
            self._pending[index] = sums

    def _solve_pending(self) -> None:
        """Solve what this process owns; what fails is told to the others later."""
        for index in sorted(self._pending):
            with self._turns.failing():
                self._solve(index, *self._take_moments(index))

    def _take_moments(
        self, index: int
    ) -> tuple[LayerMoments, numerics.CovarianceStats | None, float]:
        """
        Turn a pending layer's sums, which are freed, into moments; or read these.

        :return: the moments to fit on, those that measure the error, if any, and the
            seconds that they took
        """
        sums = self._pending.pop(index)
        if sums is None:
            assert self._store is not None
            device = execution_device(self._layers.attention(index))
            fit, stored = self._store.load(index, self._layers.names[index])
            stored = None if stored is None else stored.to(device)
            return *self._solver.divided(fit.to(device), stored), 0.0
        statistics, held_out = sums
        assert statistics is not None
        try:
            fit = statistics.finalize()
            heldout = None if held_out is None else held_out.finalize()
        except ValueError as err:
            raise type(err)(f"{self._layers.names[index]}: {err}") from err
        if not isinstance(heldout, numerics.CovarianceStats):
            if self._store is not None:
                self._store.save(index, self._layers.names[index], fit, heldout)
            fit, heldout = self._solver.divided(fit, heldout)
        return fit, heldout, statistics.seconds

    def _solve(
        self,
        index: int,
        moments: LayerMoments,
        heldout: numerics.CovarianceStats | None,
        seconds: float,
    ) -> None:
        """Solve one layer and enter what comes of it; ``seconds`` the moments took."""
        solved = self._solver.solve(index, moments, heldout)
        name = self._layers.names[index]
        self._warn_of_rank(name, solved.rank, moments.residual.mean_x.numel())
        measurement = dataclasses.replace(
            solved.measurement, seconds=seconds + solved.measurement.seconds
        )
        if self._progress is not None:
            self._progress.measured(measurement.seconds)
        self._board.add(index, measurement, solved.replacement)
        logger.log(
            self._log_level,
            "{}: {} tokens, NMSE {:.4f}, CCA bound {:.4f}, dampening {:.1e}, {:.2f} s",
            name,
            measurement.num_tokens,
            measurement.nmse,
            measurement.cca_bound,
            measurement.dampening_frac,
            measurement.seconds,
        )

    def _warn_of_rank(self, name: str, rank: int, hidden_size: int) -> None:
        """Say once, in the pass that ranks, that data are poorer than the model."""
        if rank >= hidden_size / 2 or self._warned or self._log_level != "INFO":
            return
        self._warned = True
        logger.warning(
            "{}: over the calibration set its input varies in {} of {} directions, so "
            "most of the map is not determined by data, and errors measured on such "
            "data say little about others. Use more varied text.",
            name,
            rank,
            hidden_size,
        )
