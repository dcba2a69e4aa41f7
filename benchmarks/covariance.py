# SPDX-License-Identifier: Apache-2.0
"""
Time the sums of second moments, from activations of 16 bits and from float32, and say
what the shorter ones change.

On a GPU the accumulator multiplies activations of 16 bits in bfloat16
(nbl_modifier/numerics/covariance.py); the same values as float32 go through float64
products. Both see the same tokens, in turn in one process; what follows from both, the
covariances, the map and the CCA bound, is compared. Run as

    python benchmarks/covariance.py --d 4096,8192 --device cuda

On a CPU both take the same way, and only their speeds can be read off.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nbl_modifier.benchmark.timing import now
from nbl_modifier.numerics import (
    CovarianceAccumulator,
    CovarianceStats,
    solve_attention,
)

# Multiply-adds per token in units of d^2: a triangle of C_xx and of C_yy, and C_yx.
PRODUCTS = 2.0


def batches(
    d: int, tokens: int, rows: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Yield activations like a residual stream's, in bfloat16: ``[rows, d]`` twice.

    Channels spread over two orders of magnitude, with means, and an output that depends
    on them in part.

    :param d: width of x and y
    :param tokens: in all batches together, a multiple of ``rows``
    :param rows: of each batch
    :param device: where to make them
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spread, mean = torch.logspace(0, -2, d, device=device), normal(d)
    signal = normal(d, d) / d**0.5
    for _ in range(tokens // rows):
        latent = normal(rows, d)
        target = torch.tanh(latent @ signal) + 0.5 * normal(rows, d)
        yield (latent * spread + mean).bfloat16(), target.bfloat16()


def accumulate(
    d: int, data: list[tuple[Tensor, Tensor]], dtype: torch.dtype, device: str
) -> tuple[CovarianceStats, float]:
    """
    Return the statistics and the seconds of the sums.

    :param d: width of x and y
    :param data: from :func:`batches`
    :param dtype: that the accumulator is given them in
    :param device: such as ``cpu`` or ``cuda``
    """
    accumulator = CovarianceAccumulator(d, d, device=device)
    seconds = 0.0
    for x, y in data:
        x, y = x.to(dtype), y.to(dtype)
        started_at = now(device)
        accumulator.update(x, y)
        seconds += now(device) - started_at
    return accumulator.finalize(), seconds


def relative(mine: Tensor, theirs: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of ``theirs``."""
    return float(torch.linalg.norm(mine - theirs) / torch.linalg.norm(theirs))


def measure(args: argparse.Namespace, d: int) -> dict[str, Any]:
    """
    Run both in turn, after an unmeasured round on one batch.

    :param args: the command line
    :param d: width of x and y
    :return: ``seconds`` of each round by dtype, and what differs
    """
    data = list(batches(d, args.tokens, args.rows, args.device))
    kinds = (torch.bfloat16, torch.float32)
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    found: dict[torch.dtype, CovarianceStats] = {}
    for kind in kinds:
        accumulate(d, data[:1], kind, args.device)
    for _ in range(args.repeats):
        for kind in kinds:
            found[kind], took = accumulate(d, data, kind, args.device)
            seconds[kind].append(took)
    half, full = (found[kind] for kind in kinds)
    ours, exact = solve_attention(half), solve_attention(full)
    return {
        "seconds": seconds,
        "cov_xx": relative(half.cov_xx, full.cov_xx),
        "cov_yx": relative(half.cov_yx, full.cov_yx),
        "weight": relative(ours.linear_map.weight, exact.linear_map.weight),
        "bound": abs(ours.bound - exact.bound) / exact.bound,
    }


def row(d: int, tokens: int, result: dict[str, Any]) -> str:
    """Return one line of the table."""
    half, full = result["seconds"].values()
    ratios = [f / h for h, f in zip(half, full, strict=True)]
    medians = [statistics.median(values) for values in (half, full)]
    speeds = [2 * PRODUCTS * d * d * tokens / seconds / 1e12 for seconds in medians]
    cells = [f"{d:,}"]
    for median, values, speed in zip(medians, (half, full), speeds, strict=True):
        cells.append(f"{median:.3f} ({min(values):.3f}..{max(values):.3f})")
        cells.append(f"{speed:,.2f}")
    cells.append(f"{statistics.median(ratios):.2f}")
    names = ("cov_xx", "cov_yx", "weight", "bound")
    return f"| {' | '.join(cells + [f'{result[name]:.1e}' for name in names])} |"


def main() -> None:
    """Parse the command line, measure, print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", default="1024", help="widths of x and y, a list")
    parser.add_argument("--tokens", type=int, default=32768, help="in all batches")
    parser.add_argument("--rows", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{args.tokens:,} tokens, {args.rows:,} at a time, {args.device}, "
        f"{torch.get_num_threads()} threads, {args.repeats} rounds: median (min..max). "
        "TFLOP/s of 4 d^2 operations per token; differences are relative\n"
    )
    print(
        "| d | from bfloat16, s | TFLOP/s | from float32, s | TFLOP/s | times faster |"
        " C_xx | C_yx | map | bound |"
    )
    print("|" + "---:|" * 10)
    for d in map(int, args.d.split(",")):
        print(row(d, args.tokens, measure(args, d)), flush=True)


if __name__ == "__main__":
    main()
