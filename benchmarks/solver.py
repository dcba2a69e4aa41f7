# SPDX-License-Identifier: Apache-2.0
"""
Time the solver against the reference's algorithm, on the same statistics.

Both answer what NBL asks of one attention layer: the weight from x to y and the CCA
bound from x to y + x. Ours: Cholesky factors and triangular solves. Reference (NBL,
arXiv:2505.21077, Algorithms 1 and 2): eigendecompositions of both covariances, SVD of
the whitened cross-covariance, and the inverse of C_xx for the weight. Both in torch,
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
    solve_attention,
)

Solver = Callable[[CovarianceStats], tuple[Tensor, float]]


def make_stats(d: int, device: str) -> CovarianceStats:
    """
    Return statistics of ``4 d`` tokens whose C_xx has a condition number near 1e5.

    :param d: width of x and y
    :param device: where to compute and keep them
    :return: statistics with ``cov_yy``
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spread = torch.logspace(0, -2, d, device=device)
    mixing = torch.linalg.qr(normal(d, d))[0]
    signal = normal(d, d) / d**0.5
    accumulator = CovarianceAccumulator(d, d, device=device)
    for _ in range(4):
        latent = normal(d, d)
        target = torch.tanh(latent @ signal) + 0.5 * normal(d, d)
        accumulator.update((latent * spread) @ mixing, target)
    return accumulator.finalize()


def ours(stats: CovarianceStats) -> tuple[Tensor, float]:
    """Return the weight ``[d, d]`` and the bound."""
    solution = solve_attention(stats)
    return solution.linear_map.weight, solution.bound


def reference(stats: CovarianceStats) -> tuple[Tensor, float]:
    """Return the weight ``[d, d]`` and the bound, as Algorithms 1 and 2 say."""
    weight = stats.cov_yx @ torch.linalg.inv(stats.cov_xx)
    stats = stats.plus_input()
    assert stats.cov_yy is not None
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


def measure(d: int, device: str, repeats: int) -> dict[str, Any]:
    """
    Run both solvers in turn ``repeats`` times, after an unmeasured round on small data.

    :param d: width of x and y
    :param device: such as ``cpu`` or ``cuda``
    :param repeats: measured rounds
    :return: the arguments, ``threads``, ``{ours,reference}_seconds`` (lists) and
        ``_median_seconds``, ``ratio`` of the medians, ``weight_difference`` (Frobenius,
        relative), ``bound_difference`` (absolute) and ``bound``
    """
    warm_up, stats = make_stats(64, device), make_stats(d, device)
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
    parser.add_argument("--d", type=int, default=2048, help="width of x and y")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    result = measure(args.d, args.device, args.repeats)
    print(
        f"d={result['d']} float64 {result['device']}, "
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
