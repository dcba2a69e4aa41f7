# SPDX-License-Identifier: Apache-2.0
"""
Measure the memory that calibration takes for one layer, in units of d^2 float64 values.

- sums: what is kept between batches
- calibrating: the most there is while batches are added, their copies included
- solving: the most there is from the last batch to the map, the bound and the errors
- activations: what the reference keeps instead, x and y of all tokens in float64 (NBL,
  src/calculate_cca.py of LIONS-EPFL/NBL, commit b2615f7), by count

Peaks are the process's resident memory (of a new process per setting, above what it had
before), or what torch has allocated on the GPU; what LAPACK takes is in them. Run as

    python benchmarks/memory.py --d 2048
    python benchmarks/memory.py --d 4096,8192 --tokens 524288 --device cuda
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch
from torch import Tensor

from nbl_modifier import numerics
from nbl_modifier.layer_statistics.moments import (
    HeldoutStatistics,
    LayerMoments,
    LayerStatistics,
)

ROWS = 512
BATCHES = 32
# input, and what of held-out tokens is kept
SETTINGS = {
    "the paper's": ("residual", None),
    "held-out tokens": ("residual", HeldoutStatistics),
    "input: normalized": ("normalized", None),
    "preset: best": ("normalized", HeldoutStatistics),
    "preset: best, statistics": ("normalized", LayerStatistics),
}


class Memory:
    """
    The most memory there was since the last look.

    :param device: such as ``cpu`` or ``cuda``
    """

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._before = 0
        self._before = self.peak()

    def peak(self) -> int:
        """Return bytes above those there were at the start; then forget the peak."""
        if self._cuda:
            most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return most - self._before
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        kilobytes = next(
            line.split()[1] for line in status.splitlines() if "VmHWM" in line
        )
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return int(kilobytes) * 1024 - self._before


def run(setting: str, d: int, device: str) -> tuple[int, int, int]:
    """
    Return the bytes of the sums, and the peaks of calibrating and solving.

    :param setting: a key of ``SETTINGS``
    :param d: width of the layer
    :param device: such as ``cpu`` or ``cuda``
    """
    source, held_out = SETTINGS[setting]
    normalized = source == "normalized"
    whole(64, normalized, held_out, device, None)  # what libraries take once
    return whole(d, normalized, held_out, device, Memory(device))


def whole(
    d: int,
    normalized: bool,
    held_out: type[LayerStatistics | HeldoutStatistics] | None,
    device: str,
    memory: Memory | None,
) -> tuple[int, int, int]:
    """Calibrate and solve one layer; see :func:`run`."""
    form = ("layer", d, normalized, torch.device(device))
    generator = torch.Generator(device).manual_seed(0)

    def batch() -> Tensor:
        return torch.randn(1, ROWS, d, generator=generator, device=device)

    sums = [LayerStatistics(*form)]
    others = [] if held_out is None else [held_out(*form)]
    for _ in range(BATCHES):
        for each in (*sums, *others):
            each.update(batch(), batch(), batch(), None)
    del each  # or it would be kept beyond its moments
    kept = sum(each.nbytes for each in (*sums, *others))
    calibrating = memory.peak() if memory else 0
    moments = sums.pop().finalize()
    heldout = others.pop().finalize() if others else None
    linear_map = numerics.solve_attention(moments.residual).linear_map
    if moments.normalized is not None:
        linear_map = numerics.solve_lmmse(moments.normalized)
    if isinstance(heldout, LayerMoments):
        heldout = heldout.normalized or heldout.residual
    for stats in (moments.normalized or moments.residual, heldout):
        if stats is not None:
            numerics.nmse(stats, linear_map)
    return kept, calibrating, memory.peak() if memory else 0


def main() -> None:
    """Parse the command line, measure, print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", default="2048", help="widths, a list")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tokens", type=int, default=262144, help="for the reference's activations"
    )
    parser.add_argument(
        "--setting", choices=SETTINGS, action="append", help="only this one (all)"
    )
    args = parser.parse_args()
    print(
        f"In units of d^2 float64 values, {args.device}, batches of {ROWS} tokens, "
        f"activations of {args.tokens:,} tokens\n"
    )
    print("| d | setting | sums | calibrating | solving | activations |")
    print("|---:|---|---:|---:|---:|---:|")
    context = multiprocessing.get_context("spawn")
    for d in map(int, args.d.split(",")):
        for setting in args.setting or SETTINGS:
            with context.Pool(1) as pool:
                measured = pool.apply(run, (setting, d, args.device))
            cells = [f"{value / (8 * d * d):.1f}" for value in measured]
            cells.append(f"{2 * args.tokens / d:.0f}")
            print(f"| {d:,} | {setting} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
