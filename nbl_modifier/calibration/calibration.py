"""
One calibration pass over the attention layers: hooks in, solved linear maps out.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from nbl_modifier import numerics
from nbl_modifier.architectures import Architecture
from nbl_modifier.criteria import CRITERIA
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.layer_statistics.moments import (
    HeldoutStatistics,
    LayerMoments,
    LayerStatistics,
    check_causal,
    valid_tokens,
)
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.layer_statistics.windows import check_num_tokens
from nbl_modifier.replacement.realize import no_map, realize, weights_map
from nbl_modifier.replacement.surgery import Replacement, execution_device, weight_dtype

from .cost import Progress

__all__ = ["BatchInFlight", "Calibration", "Measurement"]

# What equal values may differ by after many layers, in units in the last place. The
# same token over and over, behind 15 layers in float32, came out 2.3 apart, of the norm
# of the mean; text 25,000,000.
_EQUAL_ULPS = 32.0
# What is stored must serve any estimator and may yet be fitted on, so it has it all.
_Heldout = LayerStatistics | HeldoutStatistics


@dataclass(frozen=True)
class BatchInFlight:
    """
    What hooks have to know of the batch that runs, beside what their layer is given.

    :param number: in the calibration set, from 0
    :param loss_mask: nonzero where a token counts, ``[batch, tokens]``; None: all do
    :param mask_implementation: the attention implementation that the model makes its
        masks for, such as ``eager``
    """

    number: int
    loss_mask: Tensor | None
    mask_implementation: str


@dataclass(frozen=True)
class Measurement:
    """
    How linear one attention layer is.

    :param num_tokens: rows that the statistics were taken over
    :param nmse: error of the linear map over the variance of the attention output, in
        sample
    :param expected_nmse: the same to be expected on new tokens, see
        :func:`numerics.expected_nmse`; None if there are hardly more tokens than
        dimensions
    :param heldout_nmse: the same measured on held-out tokens; None if there are none
    :param residual_nmse: the same error over the variance of the residual stream after
        attention
    :param cca_bound: ``sum_i (1 - rho_i^2)``, arXiv:2505.21077, Algorithm 2
    :param cosine: one minus the mean cosine similarity of the residual stream before
        and after attention, dimensionless
    :param dampening_frac: dampening used, a fraction of the mean diagonal of C_xx
    :param seconds: spent on statistics and solve
    :param canonical_correlations: quantiles of the rho_i, if asked for
    """

    num_tokens: int
    nmse: float
    expected_nmse: float | None
    heldout_nmse: float | None
    residual_nmse: float
    cca_bound: float
    cosine: float
    dampening_frac: float
    seconds: float
    canonical_correlations: list[float] | None = None


class Calibration:
    """
    Statistics of the layers in flight, and the results of those that are finished.

    Of the replacements only the ``keep`` best are held, on the CPU, in the dtype of the
    model: all of an 80-layer model's would take more memory than its statistics.

    What is fitted is what attention adds to the residual stream: its output, through
    the norm that some families have behind it. The bound is on the stream after that
    addition, and what is linear in its input is the addition, not what a norm makes of
    it; a linear map of attention's output alone would also lose the shrinkage that
    makes an uncertain estimate a good one, which the norm undoes.

    :param layers: decoder layer by index
    :param names: name of its attention module, likewise
    :param architecture: names of the modules inside the layers
    :param spec: what is replaced by what, in every layer
    :param estimator: ``lmmse``, or ``wo_wv``: the map in attention's own weights
    :param dampening_frac: fraction of the mean diagonal of C_xx
    :param criterion: the field of :class:`Measurement` that decides which replacements
        to keep
    :param keep: how many
    :param held_out: numbers of the batches that are not fitted on, only measure the
        error
    :param correlations: whether to measure the canonical correlations
    :param measure_held_out: otherwise they are fitted on, too; they are only kept apart
        in the store
    :param streams: residual stream by batch, ``[batch, tokens, d]``, that the estimator
        reads instead of the model's own. Its target becomes what leads from there to
        the model's own stream behind the layer
    :param store: keeps the statistics of finished layers; those that it has already are
        read instead of measured
    :param ranks: the processes of the run; those of ``torch.distributed`` if not given
    :param log_level: of the line that each layer gets
    :param progress: told when a layer begins and what it took
    """

    def __init__(
        self,
        layers: Mapping[int, nn.Module],
        names: Mapping[int, str],
        architecture: Architecture,
        *,
        spec: LinearizedLayer,
        estimator: str,
        dampening_frac: float,
        criterion: str,
        keep: int,
        held_out: Collection[int] = (),
        correlations: bool = False,
        measure_held_out: bool = True,
        streams: Mapping[int, Tensor] | None = None,
        store: StatisticsStore | None = None,
        ranks: Ranks | None = None,
        log_level: str = "INFO",
        progress: Progress | None = None,
    ) -> None:
        self.measured: dict[int, Measurement] = {}
        self.replacements: dict[int, Replacement] = {}
        self._layers = layers
        self._names = names
        self._architecture = architecture
        self._spec = spec
        self._estimator = estimator
        self._normalized = spec.input == "normalized"
        self._dampening_frac = dampening_frac
        self._criterion = criterion
        self._keep = keep
        # Kept apart only where something comes of it.
        self._held_out = held_out if measure_held_out or store is not None else ()
        self._correlations = correlations
        self._measure_held_out = measure_held_out
        self._streams = streams
        self._store = store
        self._ranks = ranks or Ranks()
        self._log_level = log_level
        self._progress = progress
        self._stored = frozenset(i for i in layers if store is not None and i in store)
        self._failure: Exception | None = None
        self._warned = False
        self._pending: dict[int, tuple[LayerStatistics, _Heldout | None] | None] = {}
        self._started_at = time.perf_counter()
        self._residuals: dict[int, tuple[int, Tensor]] = {}
        self._statistics: dict[int, LayerStatistics] = {}
        self._heldout: dict[int, _Heldout] = {}

    @property
    def seconds(self) -> float:
        """Wall time since calibration started."""
        return time.perf_counter() - self._started_at

    def scores(self) -> dict[int, float]:
        """Return the criterion's value by layer index, lower is more linear."""
        criterion = CRITERIA[self._criterion]
        scores = {i: criterion.of(m) for i, m in self.measured.items()}
        return {i: score for i, score in scores.items() if score is not None}

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
        if index in self._stored:
            return
        if self._spec.kind == "block":
            see = self._guarded(partial(self._see_block, in_flight, index))
            register(self._layers[index], see, "forward", with_kwargs=True)
            return
        if self._architecture.input_norm is not None:
            norm = self._layers[index].get_submodule(self._architecture.input_norm)
            keep = partial(self._see_norm_input, in_flight, index)
            register(norm, keep, "forward_pre")
        see = self._guarded(partial(self._see_attention, in_flight, index))
        register(self._attention(index), see, "forward", with_kwargs=True)

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return the hook, made to stop after a failure that is yet to be told."""

        def run(*args: Any, **kwargs: Any) -> None:
            if self._progress is not None:
                self._progress.begin()
            if self._failure is None:
                with self._failing():
                    hook(*args, **kwargs)

        return run

    def _see_norm_input(
        self,
        in_flight: Callable[[], BatchInFlight],
        index: int,
        _module: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        """Forward-pre hook on the input norm: keep the residual stream, R."""
        self._residuals[index] = (in_flight().number, args[0])

    def _see_attention(
        self,
        in_flight: Callable[[], BatchInFlight],
        index: int,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, ...],
    ) -> None:
        """
        Forward hook on attention: add the batch to the layer's statistics.

        :raises RuntimeError: if the pipeline lost the causal mask, or ran norm and
            attention in different passes
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        started_at = time.perf_counter()
        name = self._names[index]
        normalized = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch = in_flight()
        number, residual = batch.number, normalized
        if self._architecture.input_norm is not None:
            number, residual = self._residuals.pop(index, (-1, None))
        if residual is None or number != batch.number:
            raise RuntimeError(
                f"{name}: its input norm ran on another batch than attention did. Set "
                "sequential_targets to the decoder layer class, or leave it unset."
            )
        added = self._added_to_stream(index, output[0])
        mask = kwargs.get("attention_mask")
        self._add(batch, index, mask, residual, normalized, added, started_at)

    def _see_block(
        self,
        in_flight: Callable[[], BatchInFlight],
        index: int,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        """
        Forward hook on a decoder layer: add the batch to the layer's statistics.

        :raises RuntimeError: if the pipeline lost the causal mask
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        started_at = time.perf_counter()
        residual = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # in float32: a difference of streams, smaller than either
        added = output.float() - residual.float()
        mask = kwargs.get("attention_mask")
        self._add(in_flight(), index, mask, residual, residual, added, started_at)

    def _add(
        self,
        batch: BatchInFlight,
        index: int,
        mask: Tensor | None,
        residual: Tensor,
        normalized: Tensor,
        added: Tensor,
        started_at: float,
    ) -> None:
        """
        Add one batch to the statistics of one layer.

        :param batch: which it is
        :param mask: as called with, ``[batch, 1, tokens, tokens]`` or None
        :param residual: the stream before what is replaced, ``[batch, tokens, d]``
        :param normalized: what attention reads of it, likewise
        :param added: what is added to it there, likewise
        :param started_at: when the hook began
        """
        made_for = batch.mask_implementation
        check_causal(self._names[index], self._attention(index), made_for, mask)
        valid = valid_tokens(normalized, mask, batch.loss_mask)
        if self._streams is not None:
            # without one the layer is the first, and its input is the model's own
            stream = self._streams.get(batch.number, residual).to(residual.device)
            # in float32: a difference of streams, far smaller than either
            added = (residual.float() - stream.float()) + added.float()
            residual = stream
            if self._normalized:
                normalized = self._normalize(index, stream)
        statistics = self._statistics_of(index, batch.number, normalized)
        statistics.update(residual, normalized, added, valid)
        statistics.seconds += time.perf_counter() - started_at

    def _statistics_of(self, index: int, number: int, like: Tensor) -> _Heldout:
        """Return what the rows of a batch are added to: for the fit, or held out."""
        form = (self._names[index], like.shape[-1], self._normalized, like.device)
        if number not in self._held_out:
            if index not in self._statistics:
                self._statistics[index] = LayerStatistics(*form)
            return self._statistics[index]
        if index not in self._heldout:
            kept = self._store is not None
            self._heldout[index] = (LayerStatistics if kept else HeldoutStatistics)(
                *form
            )
        return self._heldout[index]

    def _added_to_stream(self, index: int, output: Tensor) -> Tensor:
        """Return what attention's output of layer ``index`` adds to the stream."""
        post_norm, scale = self._architecture.post_norm, self._output_scale(index)
        if post_norm is not None:
            output = self._layers[index].get_submodule(post_norm)(output)
        return output if scale == 1.0 else output * scale

    def _output_scale(self, index: int) -> float:
        scale = self._architecture.output_scale
        return 1.0 if scale is None else getattr(self._layers[index], scale)

    def solve_finished(self, modules: Iterable[nn.Module]) -> None:
        """
        Solve the layers whose attention is among ``modules``, free their statistics.

        :param modules: what the pipeline has finished calibrating
        :raises ValueError: naming the layer, if it saw too few tokens
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        finished = set(map(id, modules))
        for position, index in enumerate(sorted(self._layers)):
            if id(self._attention(index)) in finished:
                self._finish(index, self._ranks.owner(position))
                if (position + 1) % self._ranks.size == 0:  # every process has one
                    self._solve_pending()

    def finish(self) -> None:
        """
        Solve what is left, and let every process know all results.

        :raises ValueError: as :meth:`solve_finished`
        :raises RuntimeError: if another process has failed
        """
        self._solve_pending()
        self._ranks.check(self._failure)
        if self._ranks.alone:
            return
        mine = self.measured
        self.measured = self._ranks.merge(mine)
        owners = self._ranks.merge(dict.fromkeys(mine, self._ranks.rank))
        scores = self.scores()
        best = sorted(scores, key=lambda index: (scores[index], index))[: self._keep]
        self.replacements = {
            index: self._ranks.send(self.replacements.get(index), owners[index])
            for index in best
        }

    def _finish(self, index: int, owner: int) -> None:
        """Gather the statistics of one layer in the process that solves it."""
        if index in self._stored:
            if owner == self._ranks.rank:
                self._pending[index] = None
            return
        statistics = self._statistics.pop(index, None)
        held_out = self._heldout.pop(index, None)
        if statistics is None and self._ranks.alone:
            return  # reported when calibration ends
        if statistics is None and self._failure is None:
            self._failure = RuntimeError(f"{self._names[index]}: has seen no data")
        self._ranks.check(self._failure)
        assert statistics is not None
        for each in (statistics, held_out):
            if each is not None:
                self._ranks.pool(each, owner)
        if owner == self._ranks.rank:
            self._pending[index] = statistics, held_out

    def _solve_pending(self) -> None:
        """Solve what this process owns; what fails is told to the others later."""
        for index in sorted(self._pending):
            with self._failing():
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
            device = execution_device(self._attention(index))
            fit, stored = self._store.load(index, self._names[index])
            stored = None if stored is None else stored.to(device)
            return *self._divided(fit.to(device), stored), 0.0
        statistics, held_out = sums
        try:
            fit = statistics.finalize()
            heldout = None if held_out is None else held_out.finalize()
        except ValueError as err:
            raise type(err)(f"{self._names[index]}: {err}") from err
        if not isinstance(heldout, numerics.CovarianceStats):
            if self._store is not None:
                self._store.save(index, self._names[index], fit, heldout)
            fit, heldout = self._divided(fit, heldout)
        return fit, heldout, statistics.seconds

    def _divided(
        self, fit: LayerMoments, heldout: LayerMoments | None
    ) -> tuple[LayerMoments, numerics.CovarianceStats | None]:
        """Return the moments to fit on, and those that measure the error, if any."""
        if heldout is None:
            return fit, None
        if not self._measure_held_out:
            return fit.merge(heldout), None
        return fit, self._fit_of(heldout)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """
        Keep an error until the other processes can be told.

        Raised at once it would leave them waiting for this one. If there are none, it
        is raised at once.
        """
        try:
            yield
        except Exception as err:
            if self._ranks.alone:
                raise
            self._failure = self._failure or err

    def _attention(self, index: int) -> nn.Module:
        return self._layers[index].get_submodule(self._architecture.attention)

    def _normalize(self, index: int, stream: Tensor) -> Tensor:
        """Return what attention of layer ``index`` would read of ``stream``."""
        if self._architecture.input_norm is None:
            return stream
        norm = self._layers[index].get_submodule(self._architecture.input_norm)
        normalized: Tensor = norm.forward(stream)  # past the hooks on it
        return normalized

    def _fit_of(self, moments: LayerMoments) -> numerics.CovarianceStats:
        """Return the moments of what the estimator reads, and of its target."""
        if not self._normalized:
            return moments.residual
        assert moments.normalized is not None
        return moments.normalized

    def _solve(
        self,
        index: int,
        moments: LayerMoments,
        heldout: numerics.CovarianceStats | None,
        seconds: float,
    ) -> None:
        """
        Measure and fit one layer.

        :param moments: of the tokens to fit on
        :param heldout: of those that are held out, of what the estimator reads and of
            its target
        :param seconds: that the moments took
        """
        started_at = time.perf_counter()
        name = self._names[index]
        hidden_size = moments.residual.mean_x.numel()
        check_num_tokens(name, moments.num_tokens, hidden_size)
        try:
            fit = self._fit_of(moments)
            for read in {id(each): each for each in (moments.residual, fit)}.values():
                _check_varied(read, weight_dtype(self._attention(index)))
            solution = numerics.solve_attention(moments.residual, self._dampening_frac)
            self._warn_of_rank(name, solution.rank, hidden_size)
            linear_map, replacement = self._replacement(index, solution, fit)
            nmse = numerics.nmse(fit, linear_map)
            correlations = None
            if self._correlations:
                correlations = numerics.correlation_quantiles(
                    moments.residual.plus_input(), self._dampening_frac
                )
            heldout_nmse = None
            if heldout is not None:
                heldout_nmse = numerics.nmse(heldout, linear_map)
        except (ValueError, torch.linalg.LinAlgError) as err:
            raise type(err)(f"{name}: {err}") from err
        # The same error in another unit: only the variance it is divided by differs.
        variance_ratio = float(fit.var_y.sum()) / solution.residual_variance
        # What was not fitted follows no sample.
        fitted = self._spec.method == "linear" and self._estimator == "lmmse"
        dimensions = hidden_size if fitted else 0
        expected = numerics.expected_nmse(nmse, fit.num_tokens, dimensions)
        measurement = Measurement(
            num_tokens=fit.num_tokens,
            nmse=nmse,
            expected_nmse=expected if math.isfinite(expected) else None,
            heldout_nmse=heldout_nmse,
            residual_nmse=nmse * variance_ratio,
            cca_bound=solution.bound,
            cosine=moments.cosine_distance,
            dampening_frac=linear_map.dampening_frac,
            seconds=seconds + time.perf_counter() - started_at,
            canonical_correlations=correlations,
        )
        self.measured[index] = measurement
        if self._progress is not None:
            self._progress.measured(measurement.seconds)
        self.replacements[index] = replacement
        self._drop_worst()
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

    def _replacement(
        self,
        index: int,
        solution: numerics.AttentionSolution,
        fit: numerics.CovarianceStats,
    ) -> tuple[numerics.LinearMap, Replacement]:
        """Return what replaces a layer, and its map to what is added to the stream."""
        scale = 1.0
        if self._spec.kind == "attention":
            scale = self._output_scale(index)
        if self._spec.method == "drop":
            linear_map = no_map(fit)
        elif self._estimator == "wo_wv":
            linear_map = weights_map(self._attention(index)).scaled(scale)
        elif self._normalized:
            linear_map = numerics.solve_lmmse(fit, self._dampening_frac)
        else:
            linear_map = solution.linear_map
        dtype = weight_dtype(self._attention(index))
        # The layer goes on to scale what comes from the map, as it did attention.
        return realize(self._spec, linear_map, fit, dtype, scale)

    def _drop_worst(self) -> None:
        if len(self.replacements) > self._keep:
            scores = self.scores()
            worst = max(self.replacements, key=lambda index: (scores[index], index))
            del self.replacements[worst]


def _check_varied(stats: numerics.CovarianceStats, dtype: torch.dtype) -> None:
    """
    Refuse an input that never varies: what attention makes of a change was not seen.

    All channels are judged together, since where terms cancel a channel's noise is that
    of the terms, far above its own mean.

    :param stats: whose x is the input
    :param dtype: that the model computes in
    :raises ValueError: if it is the same at all tokens, up to rounding
    """
    mean, variance = stats.mean_x.square().sum(), stats.cov_xx.diagonal().sum()
    if bool(variance <= _rounding(dtype) ** 2 * mean):
        raise ValueError(
            f"its input is the same at all {stats.num_tokens} calibration tokens, up "
            f"to the rounding of {dtype}, so there is nothing to fit a map to. "
            "Calibrate on varied text, and check that the model's weights are not all "
            "zero."
        )


def _rounding(dtype: torch.dtype) -> float:
    """
    Return what values that should be equal may differ by, relative.

    In 16 bits, half a step: products are added up in float32, and what is left of their
    rounding is that a value falls on one of two neighbours.
    """
    computed_in = torch.promote_types(dtype, torch.float32)
    return max(_EQUAL_ULPS * torch.finfo(computed_in).eps, torch.finfo(dtype).eps / 2)
