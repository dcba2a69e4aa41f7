# SPDX-License-Identifier: Apache-2.0
"""Activations to test with, and the rounding error to expect."""

import numpy as np
import torch

from nbl_modifier.numerics import CovarianceAccumulator, CovarianceStats
from tests.numerics.oracle import Array

EPS = float(np.finfo(np.float64).eps)


def stats_of(X: Array, Y: Array) -> CovarianceStats:
    """Return the statistics of one batch."""
    accumulator = CovarianceAccumulator(X.shape[1], Y.shape[1])
    return accumulator.update(torch.from_numpy(X), torch.from_numpy(Y)).finalize()


def rounding(num_tokens: int, width: int) -> float:
    """
    Return the relative size of rounding errors in a covariance matrix and its factors.

    An entry is a sum of n products: its error is a random walk of n steps of eps/2,
    relative to the standard deviations (Higham and Mary, SIAM J. Sci. Comput. 41, 2019,
    Theorem 2.4; constant 8 has failure probability below 1e-13). In the 2-norm, d x d
    independent errors grow by 2 sqrt(d); factoring and solving add walks of d steps.
    """
    return 8.0 * EPS * np.sqrt(float(num_tokens + width) * width)


def gaussian_pair(
    num_tokens: int, d_in: int, d_out: int, seed: int = 0, noise: float = 0.5
) -> tuple[Array, Array]:
    """Return well-conditioned X and a Y that is neither linear in it nor exact."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((num_tokens, d_in))
    signal = np.tanh(X @ rng.standard_normal((d_in, d_out)) / np.sqrt(d_in))
    return X, signal + noise * rng.standard_normal((num_tokens, d_out))


def conditioned_pair(
    condition: float, num_tokens: int = 512, d_in: int = 24, d_out: int = 24
) -> tuple[Array, Array]:
    """Return X with about that condition number, not owed to the channels' scales."""
    Z, Y = gaussian_pair(num_tokens, d_in, d_out)
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0]
    spread = np.logspace(0.0, -0.5 * np.log10(condition), d_in)
    return (Z * spread) @ rotation, Y


def one_massive_token(factor: float = 1e4) -> tuple[Array, Array]:
    """Return 4096 tokens of which one is ``factor`` times as large."""
    X, Y = gaussian_pair(4096, 24, 20)
    X[1234] *= factor
    return X, Y
