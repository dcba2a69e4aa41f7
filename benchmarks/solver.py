# SPDX-License-Identifier: Apache-2.0
"""
Time the solver against the reference's, on the same statistics.

All answer what NBL asks of one attention layer: the weight from x to y and the CCA
bound from x to y + x.

- Cholesky: ours, Cholesky factors and triangular solves
- eigh + SVD + inverse: the reference's algorithm (NBL, arXiv:2505.21077, Algorithms 1
  and 2) in torch: eigendecompositions of both covariances, SVD of the whitened
  cross-covariance, and the inverse of C_xx for the weight
- reference's calls: the same by the functions that the reference's script calls on a
  CPU (src/calculate_cca.py of LIONS-EPFL/NBL, commit b2615f7): scipy's eigh and svd,
  and diagonal matrices multiplied as if they were full

In float64, in turn in one process; run as

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

import scipy.linalg
import torch
from torch import Tensor

from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    solve_attention,
)

# Operations of the Cholesky solver: two factorizations and three triangular solves.
OPERATIONS = 2 / 3 + 3
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


def reference_calls(stats: CovarianceStats) -> tuple[Tensor, float]:
    """Return the weight ``[d, d]`` and the bound, as the reference's script does."""
    residual = stats.plus_input()
    assert residual.cov_yy is not None

    def inverse_root(cov: Tensor) -> Tensor:
        eigenvalues, vectors = map(torch.from_numpy, scipy.linalg.eigh(cov.numpy()))
        return vectors @ torch.diag(eigenvalues.pow(-0.5)) @ vectors.mT

    root_yy = inverse_root(residual.cov_yy)
    whitened = root_yy @ residual.cov_yx @ inverse_root(residual.cov_xx)
    rho = scipy.linalg.svd(whitened.numpy(), full_matrices=False)[1]
    weight = stats.cov_yx @ torch.linalg.inv(stats.cov_xx)
    return weight, float((1.0 - rho**2).sum())


def measure(
    d: int, device: str, repeats: int, references: bool = True
) -> dict[str, Any]:
    """
    Run the solvers in turn ``repeats`` times, after an unmeasured round on small data.

    :param d: width of x and y
    :param device: such as ``cpu`` or ``cuda``; the reference's calls are for a CPU
    :param repeats: measured rounds
    :param references: whether to run what ours is compared with
    :return: ``d``, ``threads``, ``bound``, by solver (``ours``, ``reference`` and
        ``reference_calls``) the ``seconds`` of each round, by reference its ``ratio``
        (of the medians), ``weight_difference`` (Frobenius, relative) and
        ``bound_difference`` (absolute), and ``speed``: operations per second of ours
        over those of a matrix product
    """
    solvers: dict[str, Solver] = {"ours": ours}
    if references:
        solvers["reference"] = reference
    if references and device == "cpu":
        solvers["reference_calls"] = reference_calls
    warm_up, stats = make_stats(64, device), make_stats(d, device)
    for solver in solvers.values():
        solver(warm_up)
    product: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    found: dict[str, tuple[Tensor, float]] = {}
    for _ in range(repeats):
        for name, solver in solvers.items():
            start = time.perf_counter()
            found[name] = solver(stats)  # ends with float(), which waits for the device
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        float((stats.cov_yx @ stats.cov_xx)[0, 0])
        product.append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    weight, bound = found.pop("ours")
    return {
        "d": d,
        "threads": torch.get_num_threads(),
        "bound": bound,
        "seconds": seconds,
        "speed": OPERATIONS / medians["ours"] * statistics.median(product) / 2,
        "ratio": {name: medians[name] / medians["ours"] for name in found},
        "weight_difference": {
            name: float(torch.linalg.norm(weight - other) / torch.linalg.norm(other))
            for name, (other, _) in found.items()
        },
        "bound_difference": {
            name: abs(bound - other) for name, (_, other) in found.items()
        },
    }


def row(result: dict[str, Any]) -> str:
    """
    Return one line of the table.

    :param result: from :func:`measure`
    """

    def spread(name: str) -> list[str]:
        values = result["seconds"].get(name)
        if values is None:
            return ["", ""]
        median = statistics.median(values)
        cell = f"{median:.3f} ({min(values):.3f}..{max(values):.3f})"
        return [cell, f"{result['ratio'].get(name, 1.0):.1f}"]

    def largest(name: str) -> str:
        return f"{max(result[name].values()):.1e}" if result[name] else ""

    paper = PAPER_SECONDS.get(result["d"])
    cells = [
        f"{result['d']:,}",
        spread("ours")[0],
        f"{result['speed']:.0%}",
        *spread("reference"),
        *spread("reference_calls"),
        "" if paper is None else f"{paper:.1f}",
        largest("weight_difference"),
        f"{result['bound']:.4f}",
        largest("bound_difference"),
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
    parser.add_argument(
        "--alone", action="store_true", help="without what it is compared with"
    )
    args = parser.parse_args()
    print(
        f"float64, {args.device}, {torch.get_num_threads()} threads, {args.repeats} "
        "repeats: median (min..max). Differences, the larger: of the weight, relative, "
        "and of the bound.\n"
    )
    print(
        "| d | Cholesky, s | of a product's speed | eigh + SVD + inverse, s | ratio |"
        " reference's calls, s | ratio | paper, s | dW | bound | d bound |"
    )
    print("|" + "---:|" * 11)
    for d in map(int, args.d.split(",")):
        result = measure(d, args.device, args.repeats, references=not args.alone)
        print(row(result), flush=True)


if __name__ == "__main__":
    main()
