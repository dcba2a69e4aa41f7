# SPDX-License-Identifier: Apache-2.0
"""
Time the solver against the reference's algorithm, on the same statistics.

Both answer what NBL asks of one attention layer: the weight from x to y and the CCA
bound from x to y + x. Ours: Cholesky factors and triangular solves. Reference (NBL,
arXiv:2505.21077, Algorithms 1 and 2): eigendecompositions of both covariances, SVD of
the whitened cross-covariance, and the inverse of C_xx for the weight. Both in torch,
float64, alternating in one process; run as

    python benchmarks/solver.py --d 2048,4096
    python benchmarks/solver.py --d 4096,8192,16384 --device cuda

Beside widths of models that the paper calibrated stand its seconds per layer, on two
A100.
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

# Seconds per layer of Llama-3.1-8B, -70B and -405B, from the paper.
PAPER_SECONDS = {4096: 26.0, 8192: 78.9, 16384: 371.8}

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


def row(result: dict[str, Any]) -> str:
    """
    Return one line of the table.

    :param result: from :func:`measure`
    """

    def spread(values: list[float]) -> str:
        median = statistics.median(values)
        return f"{median:.3f} ({min(values):.3f}..{max(values):.3f})"

    paper = PAPER_SECONDS.get(result["d"])
    cells = [
        f"{result['d']:,}",
        spread(result["ours_seconds"]),
        spread(result["reference_seconds"]),
        f"{result['ratio']:.1f}",
        "" if paper is None else f"{paper:.1f}",
        f"{result['weight_difference']:.1e}",
        f"{result['bound']:.4f}",
        f"{result['bound_difference']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line, measure, print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", default="2048", help="widths of x and y, a list")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(
        f"float64, {args.device}, {torch.get_num_threads()} threads, {args.repeats} "
        "repeats: median (min..max). Differences: of the weight, relative, and of the "
        "bound.\n"
    )
    print(
        "| d | Cholesky, s | eigh + SVD + inverse, s | ratio | paper, s | dW | bound |"
        " d bound |"
    )
    print("|" + "---:|" * 8)
    for d in map(int, args.d.split(",")):
        print(row(measure(d, args.device, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
