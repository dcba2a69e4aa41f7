"""Moments of one layer in, how linear it is and what replaces it out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from nbl_modifier import numerics
from nbl_modifier.layer_statistics.moments import LayerMoments
from nbl_modifier.layer_statistics.windows import check_num_tokens
from nbl_modifier.replacement.realize import no_map, realize, weights_map
from nbl_modifier.replacement.surgery import Replacement, weight_dtype

from .layers import MeasuredLayers

__all__ = ["LayerSolver", "Measurement", "Solved"]

# What equal values may differ by after many layers, in units in the last place. The
# same token over and over, behind 15 layers in float32, came out 2.3 apart, of the norm
# of the mean; text 25,000,000.
_EQUAL_ULPS = 32.0


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


@dataclass(frozen=True)
class Solved:
    """
    A layer that is solved.

    :param measurement: how linear it is
    :param replacement: what replaces it
    :param rank: of the covariance of its input: directions in which that varies
    """

    measurement: Measurement
    replacement: Replacement
    rank: int


@dataclass(frozen=True, kw_only=True)
class LayerSolver:
    """
    Measures and fits layers. What it returns depends on nothing but what it is given.

    :param layers: what is measured
    :param estimator: ``lmmse``, or ``wo_wv``: the map in attention's own weights
    :param dampening_frac: fraction of the mean diagonal of C_xx
    :param correlations: whether to measure the canonical correlations
    :param measure_held_out: whether errors are measured on held-out tokens; otherwise
        these are fitted on, too
    """

    layers: MeasuredLayers
    estimator: str = "lmmse"
    dampening_frac: float = 0.0
    correlations: bool = False
    measure_held_out: bool = True

    def divided(
        self, fit: LayerMoments, heldout: LayerMoments | None
    ) -> tuple[LayerMoments, numerics.CovarianceStats | None]:
        """
        Return the moments to fit on, and those that measure the error, if any.

        :param fit: of the tokens that are not held out
        :param heldout: of those that are
        """
        if heldout is None:
            return fit, None
        if not self.measure_held_out:
            return fit.merge(heldout), None
        return fit, self._read(heldout)

    def solve(
        self,
        index: int,
        moments: LayerMoments,
        heldout: numerics.CovarianceStats | None = None,
    ) -> Solved:
        """
        Measure and fit one layer.

        :param index: the decoder layer
        :param moments: of the tokens to fit on
        :param heldout: of those that are held out, of what the estimator reads and of
            its target
        :raises ValueError: naming the layer, if it saw too few tokens, or an input that
            never varies
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        started_at = time.perf_counter()
        name = self.layers.names[index]
        hidden_size = moments.residual.mean_x.numel()
        check_num_tokens(name, moments.num_tokens, hidden_size)
        try:
            fit = self._read(moments)
            for read in {id(each): each for each in (moments.residual, fit)}.values():
                _check_varied(read, weight_dtype(self.layers.attention(index)))
            solution = numerics.solve_attention(moments.residual, self.dampening_frac)
            linear_map, replacement = self._replacement(index, solution, fit)
            nmse = numerics.nmse(fit, linear_map)
            correlations = None
            if self.correlations:
                correlations = numerics.correlation_quantiles(
                    moments.residual.plus_input(), self.dampening_frac
                )
            heldout_nmse = None
            if heldout is not None:
                heldout_nmse = numerics.nmse(heldout, linear_map)
        except (ValueError, torch.linalg.LinAlgError) as err:
            raise type(err)(f"{name}: {err}") from err
        # The same error in another unit: only the variance it is divided by differs.
        variance_ratio = float(fit.var_y.sum()) / solution.residual_variance
        measurement = Measurement(
            num_tokens=fit.num_tokens,
            nmse=nmse,
            expected_nmse=self._expected(nmse, fit.num_tokens, hidden_size),
            heldout_nmse=heldout_nmse,
            residual_nmse=nmse * variance_ratio,
            cca_bound=solution.bound,
            cosine=moments.cosine_distance,
            dampening_frac=linear_map.dampening_frac,
            seconds=time.perf_counter() - started_at,
            canonical_correlations=correlations,
        )
        return Solved(measurement, replacement, solution.rank)

    def _read(self, moments: LayerMoments) -> numerics.CovarianceStats:
        """Return the moments of what the estimator reads, and of its target."""
        if not self.layers.read_normalized:
            return moments.residual
        assert moments.normalized is not None
        return moments.normalized

    def _expected(self, nmse: float, num_tokens: int, hidden_size: int) -> float | None:
        # What was not fitted follows no sample.
        fitted = self.layers.spec.method == "linear" and self.estimator == "lmmse"
        dimensions = hidden_size if fitted else 0
        expected = numerics.expected_nmse(nmse, num_tokens, dimensions)
        return expected if math.isfinite(expected) else None

    def _replacement(
        self,
        index: int,
        solution: numerics.AttentionSolution,
        fit: numerics.CovarianceStats,
    ) -> tuple[numerics.LinearMap, Replacement]:
        """Return what replaces a layer, and its map to what is added to the stream."""
        spec, attention = self.layers.spec, self.layers.attention(index)
        scale = 1.0
        if spec.kind == "attention":
            scale = self.layers.output_scale(index)
        if spec.method == "drop":
            linear_map = no_map(fit)
        elif self.estimator == "wo_wv":
            linear_map = weights_map(attention).scaled(scale)
        elif self.layers.read_normalized:
            linear_map = numerics.solve_lmmse(fit, self.dampening_frac)
        else:
            linear_map = solution.linear_map
        # The layer goes on to scale what comes from the map, as it did attention.
        return realize(spec, linear_map, fit, weight_dtype(attention), scale)


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
