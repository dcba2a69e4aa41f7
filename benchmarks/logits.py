# SPDX-License-Identifier: Apache-2.0
"""
Does it matter how many logits are in float32 at a time? Both sides, in one run.

The divergence from the original model of one window, with its gradient, as distillation
takes it: in parts of 512 positions, and of as many as make 16 MB. Prints the median of
each and of their ratios::

    python benchmarks/logits.py --vocabulary 49152 151936 262144
"""

import argparse
import statistics
import sys
import time

import torch

from nbl_modifier.numerics import logits as numerics
from nbl_modifier.report.table import Table
from nbl_modifier.search.predictions import Target, divergence

LARGE_POSITIONS = 512
HEADER = (
    "vocabulary",
    f"parts of {LARGE_POSITIONS}, s",
    "of 16 MB, s",
    "times as fast",
)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vocabulary", type=int, nargs="+", default=[49152, 151936], metavar="N")
    add("--positions", type=int, default=512, help="of the window (512)")
    add("--repeats", type=int, default=5)
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    return parser.parse_args()


def seconds(logits: torch.Tensor, original: torch.Tensor, at_a_time: int) -> float:
    """Return how long the divergence takes with as many logits in float32 at a time."""
    before, numerics.LOGITS_AT_A_TIME = numerics.LOGITS_AT_A_TIME, at_a_time
    positions = torch.arange(1, logits.shape[1])
    target = Target(0, positions, torch.zeros_like(positions))
    start = time.perf_counter()
    divergence([target], logits, original).backward()
    taken = time.perf_counter() - start
    numerics.LOGITS_AT_A_TIME = before
    return taken


def main() -> int:
    """Measure and print."""
    args = parse_arguments()
    rows: list[tuple[str, ...]] = []
    for vocabulary in args.vocabulary:
        shape = (1, args.positions, vocabulary)
        dtype = getattr(torch, args.dtype)
        original, logits = (torch.randn(shape).to(dtype) for _ in range(2))
        logits.requires_grad_(True)
        sides = (LARGE_POSITIONS * vocabulary, numerics.LOGITS_AT_A_TIME)
        pairs = []
        for _ in range(args.repeats + 1):
            logits.grad = None
            pairs.append([seconds(logits, original, size) for size in sides])
        pairs = pairs[1:]  # the first has caches to fill
        large, small = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        rows.append((f"{vocabulary:,}", f"{large:.2f}", f"{small:.2f}", f"{ratio:.2f}"))
    print(Table(HEADER, rows).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
