# SPDX-License-Identifier: Apache-2.0
"""
Batch oracle: the paper's algorithms from stored activations, in numpy and scipy.
Imports neither nbl_modifier nor torch, and shares no formula where there is another.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Means and covariances of X [n, d_in], Y [n, d_out], divisor n - 1."""

    mean_x: Array
    mean_y: Array
    cov_xx: Array
    cov_yx: Array
    cov_yy: Array


def centred(X: Array) -> tuple[Array, Array]:
    """Return X less its mean, and the mean; computed in 80 bits."""
    wide = X.astype(np.longdouble)
    mean = wide.mean(axis=0)
    return (wide - mean).astype(np.float64), mean.astype(np.float64)


def moments(X: Array, Y: Array) -> Moments:
    """Return the moments of the whole batch at once."""
    (Xc, mean_x), (Yc, mean_y) = centred(X), centred(Y)
    divisor = len(X) - 1
    return Moments(
        mean_x, mean_y, Xc.T @ Xc / divisor, Yc.T @ Xc / divisor, Yc.T @ Yc / divisor
    )


def inverse_square_root(C: Array) -> Array:
    """Return the symmetric ``C^(-1/2)`` by eigendecomposition."""
    eigenvalues, V = scipy.linalg.eigh(C)
    root: Array = (V / np.sqrt(eigenvalues)) @ V.T
    return root


def canonical_correlations(X: Array, Y: Array) -> Array:
    """
    Return the singular values of ``C_yy^(-1/2) C_yx C_xx^(-1/2)``.

    NBL, arXiv:2505.21077, Algorithm 2, step by step.
    """
    m = moments(X, Y)
    whitened = inverse_square_root(m.cov_yy) @ m.cov_yx @ inverse_square_root(m.cov_xx)
    rho: Array = scipy.linalg.svd(whitened, compute_uv=False)
    return rho


def nmse_bound(X: Array, Y: Array) -> float:
    """Return ``(d_out - r) + sum_{i<=r} (1 - rho_i^2)``, Algorithm 2."""
    rho = canonical_correlations(X, Y)
    return Y.shape[1] - len(rho) + float(np.sum((1.0 - rho) * (1.0 + rho)))


def lmmse(X: Array, Y: Array, ridge: Array | None = None) -> tuple[Array, Array]:
    """
    Return W and b of the least-squares fit, by an SVD of the centred activations.

    Never forms a covariance: its error grows with the square root of the condition
    number that a solver of the normal equations sees. ``ridge`` [d_in] is added to the
    diagonal of C_xx, as rows of the least-squares problem; channels are scaled to unit
    variance first, so that the SVD does not drop small ones.
    """
    (Xc, mean_x), (Yc, mean_y) = centred(X), centred(Y)
    scale = np.sqrt(np.mean(Xc**2, axis=0))
    scale[scale == 0] = 1.0
    if ridge is not None:
        rows = np.diag(np.sqrt(ridge * (len(X) - 1)))
        Xc = np.vstack([Xc, rows])
        Yc = np.vstack([Yc, np.zeros((len(rows), Y.shape[1]))])
    solution = scipy.linalg.lstsq(Xc / scale, Yc, lapack_driver="gelsd")[0]
    W = solution.T / scale
    return W, mean_y - W @ mean_x


def mse(
    X: Array, Y: Array, W: Array, b: Array, dtype: type[np.floating] = np.longdouble
) -> float:
    """
    Return ``sum_i ||y_i - W x_i - b||^2 / (n - 1)`` from the residuals.

    In 80 bits, for which there is no BLAS: of large ones it takes seconds, where
    ``dtype`` float64 may do.
    """
    wide = Y.astype(dtype) - X.astype(dtype) @ W.T - b
    return float(np.sum(wide**2) / (len(X) - 1))


def nmse(
    X: Array, Y: Array, W: Array, b: Array, dtype: type[np.floating] = np.longdouble
) -> float:
    """Return the mean squared error over the total variance of Y."""
    variance = float(np.sum(centred(Y)[0] ** 2) / (len(Y) - 1))
    return mse(X, Y, W, b, dtype) / variance


def condition_number(X: Array) -> float:
    """Return the condition number of the correlation matrix of X's live channels."""
    Xc = centred(X)[0]
    norms = np.linalg.norm(Xc, axis=0)
    s = scipy.linalg.svd(Xc[:, norms > 0] / norms[norms > 0], compute_uv=False)
    return float((s[0] / s[-1]) ** 2)


def reduced_rank(X: Array, Y: Array, rank: int) -> tuple[Array, Array]:
    """
    Return W and b of the best map of that rank, by truncating the whitened regression.

    ``W_r = [C_yx C_xx^(-1/2)]_r C_xx^(-1/2)``, with ``[.]_r`` the truncated SVD: the
    error is ``||C_yx C_xx^(-1/2) - W_r C_xx^(1/2)||_F^2`` plus a constant.
    """
    m = moments(X, Y)
    root = inverse_square_root(m.cov_xx)
    U, s, Vt = scipy.linalg.svd(m.cov_yx @ root, full_matrices=False)
    W: Array = (U[:, :rank] * s[:rank]) @ Vt[:rank] @ root
    return W, m.mean_y - W @ m.mean_x
