# SPDX-License-Identifier: Apache-2.0
"""
Second moments, LMMSE and CCA in float64. Imports torch and the standard library
only: no transformers, no llmcompressor.
"""

from .attention import AttentionSolution, solve_attention
from .cca import canonical_correlations, correlation_quantiles, nmse_bound
from .covariance import CovarianceAccumulator
from .gram import PackedSymmetric
from .lmmse import LinearMap, expected_nmse, mse, nmse, solve_lmmse
from .psd import DampedCholesky, damped_cholesky
from .reduced_rank import LowRankMap, reduce_rank
from .stats import CovarianceStats, NonFiniteError
from .value_output import value_output_map

__all__ = [
    "AttentionSolution",
    "CovarianceAccumulator",
    "CovarianceStats",
    "DampedCholesky",
    "LinearMap",
    "LowRankMap",
    "NonFiniteError",
    "PackedSymmetric",
    "canonical_correlations",
    "correlation_quantiles",
    "damped_cholesky",
    "expected_nmse",
    "mse",
    "nmse",
    "nmse_bound",
    "reduce_rank",
    "solve_attention",
    "solve_lmmse",
    "value_output_map",
]
