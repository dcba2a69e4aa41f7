# SPDX-License-Identifier: Apache-2.0
"""
Time the solver against the reference's algorithm, on the same statistics.

Ours: one Cholesky factor of C_xx for both the weight and the CCA bound. Reference (NBL,
arXiv:2505.21077, Algorithms 1 and 2): eigendecompositions of C_xx and C_yy, SVD of the
whitened cross-covariance, and the inverse of C_xx for the weight. Both in torch,
float64, alternating in one process; run as

    python benchmarks/solver.py --d 2048
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    damped_cholesky,
    nmse_bound,
    solve_lmmse,
)

Solver = Callable[[CovarianceStats], tuple[Tensor, float]]


def make_stats(d: int, d_out: int, device: str) -> CovarianceStats:
    """
    Return statistics of ``4 d`` tokens whose C_xx has a condition number near 1e5.

    :param d: width of x
    :param d_out: width of y
    :param device: where to compute and keep them
    :return: statistics with ``cov_yy``
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spread = torch.logspace(0, -2, d, device=device)
    mixing = torch.linalg.qr(normal(d, d))[0]
    signal = normal(d, d_out) / d**0.5
    accumulator = CovarianceAccumulator(d, d_out, device=device)
    for _ in range(4):
        latent = normal(d, d)
        target = torch.tanh(latent @ signal) + 0.5 * normal(d, d_out)
        accumulator.update((latent * spread) @ mixing, target)
    return accumulator.finalize()


def ours(stats: CovarianceStats) -> tuple[Tensor, float]:
    """Return the weight ``[d_out, d]`` and the bound."""
    factor = damped_cholesky(stats.cov_xx)
    weight = solve_lmmse(stats, factor=factor).weight
    return weight, nmse_bound(stats, factor_xx=factor)


def reference(stats: CovarianceStats) -> tuple[Tensor, float]:
    """Return the weight ``[d_out, d]`` and the bound, as Algorithms 1 and 2 say."""
    assert stats.cov_yy is not None
    weight = stats.cov_yx @ torch.linalg.inv(stats.cov_xx)
    whitened = _inverse_root(stats.cov_yy) @ stats.cov_yx @ _inverse_root(stats.cov_xx)
    # With the vectors, though only the values are used: what the reference runs.
    rho = torch.linalg.svd(whitened, full_matrices=False).S
    bound = stats.cov_yx.shape[0] - len(rho) + float((1.0 - rho.square()).sum())
    return weight, bound


def _inverse_root(cov: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(cov)
    return (vectors * eigenvalues.rsqrt()) @ vectors.mT


def _timed(solver: Solver, stats: CovarianceStats) -> tuple[float, Tensor, float]:
    start = time.perf_counter()
    weight, bound = solver(stats)  # ends with float(...), which waits for the device
    return time.perf_counter() - start, weight, bound


def measure(
    d: int, device: str, repeats: int, d_out: int | None = None
) -> dict[str, Any]:
    """
    Run both solvers in turn ``repeats`` times, after an unmeasured round on small data.

    :param d: width of x
    :param device: such as ``cpu`` or ``cuda``
    :param repeats: measured rounds
    :param d_out: width of y, ``d`` if None
    :return: the arguments, ``threads``, ``{ours,reference}_seconds`` (lists) and
        ``_median_seconds``, ``ratio`` of the medians, ``weight_difference`` (Frobenius,
        relative), ``bound_difference`` (absolute) and ``bound``
    """
    d_out = d if d_out is None else d_out
    warm_up, stats = make_stats(64, 64, device), make_stats(d, d_out, device)
    for solver in (ours, reference):
        solver(warm_up)
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        seconds, weight, bound = _timed(ours, stats)
        mine.append(seconds)
        seconds, expected_weight, expected_bound = _timed(reference, stats)
        theirs.append(seconds)
    difference = torch.linalg.norm(weight - expected_weight)
    return {
        "d": d,
        "d_out": d_out,
        "device": device,
        "threads": torch.get_num_threads(),
        "ours_seconds": mine,
        "reference_seconds": theirs,
        "ours_median_seconds": statistics.median(mine),
        "reference_median_seconds": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "weight_difference": float(difference / torch.linalg.norm(expected_weight)),
        "bound_difference": abs(bound - expected_bound),
        "bound": bound,
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--d", type=int, default=2048, help="width of x")
    parser.add_argument("--d-out", type=int, help="width of y; default: that of x")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    result = measure(args.d, args.device, args.repeats, args.d_out)
    print(
        f"d={result['d']} d_out={result['d_out']} float64 {result['device']}, "
        f"{result['threads']} threads, {args.repeats} repeats, median (min..max)"
    )
    for name in ("ours", "reference"):
        seconds = result[f"{name}_seconds"]
        print(
            f"{name:10s} {result[f'{name}_median_seconds']:8.3f} s "
            f"({min(seconds):.3f}..{max(seconds):.3f})"
        )
    print(f"{'ratio':10s} {result['ratio']:8.1f} x")
    print(
        f"weight differs by {result['weight_difference']:.1e} (relative), "
        f"bound {result['bound']:.4f} by {result['bound_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
