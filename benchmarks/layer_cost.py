# SPDX-License-Identifier: Apache-2.0
"""
What calibration costs per layer, how that grows, and what it would be for large models.

Measures, for three widths: the sums of second moments and the solution of one
attention layer as NBL takes them, and one decoder layer of a Llama over the same
tokens; and whole calibrations of small models with more layers and more tokens, whose
growth should be in proportion. From the rates at the largest width, which are the best,
follow the seconds per layer of Llama-3.1-8B, -70B and -405B at the paper's 256 x 2048
tokens, on this machine: extrapolated, not measured. Run as

    python benchmarks/layer_cost.py --d 512,1024,2048

The paper's seconds per layer (arXiv:2505.21077, on two A100) are of the numerics, not
of the forward pass.
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from nbl_modifier.benchmark.timing import now
from nbl_modifier.layer_statistics.moments import LayerStatistics
from nbl_modifier.numerics import solve_attention
from nbl_modifier.report.table import Table

HERE = Path(__file__).parent
PAPER_TOKENS, PAPER_LENGTH = 256 * 2048, 2048


@dataclass(frozen=True)
class Shape:
    """
    A model's shape.

    :param d: width of the residual stream
    :param intermediate: of the MLP
    :param heads: of queries
    :param kv_heads: of keys and values
    :param layers: decoder layers
    """

    d: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int

    def forward(self, tokens: int, length: int) -> float:
        """Return the operations of one decoder layer over sequences of ``length``."""
        keys = self.d * self.kv_heads // self.heads
        weights = 2 * self.d * (self.d + keys) + 3 * self.d * self.intermediate
        return tokens * (2.0 * weights + 2 * self.d * (length + 1))

    def sums(self, tokens: int) -> float:
        """Return the operations of the sums: symmetric ones, of a triangle."""
        return 4.0 * tokens * self.d**2

    @property
    def solution(self) -> float:
        """The operations of two factorizations and three triangular solves."""
        return (2 / 3 + 3) * self.d**3


LARGE = {
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 32),
    "Llama-3.1-70B": Shape(8192, 28672, 64, 8, 80),
    "Llama-3.1-405B": Shape(16384, 53248, 128, 8, 126),
}


def small(d: int) -> Shape:
    """Return a shape with the proportions of Llama 3."""
    heads = max(4, d // 64)
    return Shape(d, 7 * d // 2, heads, heads // 4, 1)


def measure(d: int, args: argparse.Namespace) -> dict[str, float]:
    """
    Return the least seconds of each part for one layer.

    :param d: width
    :param args: the command line
    :return: ``forward``, ``sums`` and ``solution``
    """
    device, shape = torch.device(args.device), small(d)
    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=args.length,
    )
    config._attn_implementation = "sdpa"
    generator = torch.Generator(device).manual_seed(0)
    batch = torch.randn(1, args.length, d, generator=generator, device=device)
    positions = torch.arange(args.length, device=device)[None]
    with device:
        layer: Any = LlamaDecoderLayer(config, 0).eval()
        embeddings = LlamaRotaryEmbedding(config)(batch, positions)
    batches = max(1, args.tokens // args.length)
    best = dict.fromkeys(("forward", "sums", "solution"), math.inf)
    for _ in range(args.repeats + 1):  # the first one warms up
        statistics = LayerStatistics("layer", d, False, device)
        started_at = now(args.device)
        with torch.no_grad():
            for _ in range(batches):
                output = layer(batch, position_embeddings=embeddings)
        forward = now(args.device) - started_at
        started_at = now(args.device)
        for _ in range(batches):
            statistics.update(batch, batch, output, None)
        sums = now(args.device) - started_at
        # As many tokens as a solution needs, whatever was timed.
        for _ in range(-(-2 * d // args.length)):
            noise = torch.randn(batch.shape, generator=generator, device=device)
            statistics.update(noise, noise, torch.tanh(noise) + output, None)
        started_at = now(args.device)
        solve_attention(statistics.finalize().residual)
        found = (forward, sums, now(args.device) - started_at)
        best = {k: min(b, f) for (k, b), f in zip(best.items(), found, strict=True)}
    return best


def growth(args: argparse.Namespace) -> list[tuple[str, dict[str, float]]]:
    """
    Return what whole calibrations took: one, with twice the layers, twice the tokens.

    :param args: the command line
    :return: what it was, and seconds ``in all`` and per ``layer``
    """
    calibration = runpy.run_path(str(HERE / "calibration.py"))
    d = int(args.d.split(",")[0])
    layers, samples = args.layers, max(2, 2 * args.tokens // args.length)
    found = []
    for what, count, rows in (
        ("", layers, samples),
        ("twice the layers", 2 * layers, samples),
        ("twice the tokens", layers, 2 * samples),
    ):
        before = sys.argv
        sys.argv = [
            *("calibration.py", "--hidden-size", str(d), "--quick", "--repeats", "1"),
            *("--intermediate-size", str(small(d).intermediate), "--heads", "8"),
            *("--kv-heads", "2", "--layers", str(count), "--vocab-size", "512"),
            *("--samples", str(rows), "--length", str(args.length)),
            *("--num-layers", "1", "--device", args.device),
        ]
        try:
            options = calibration["parse_args"]()
        finally:
            sys.argv = before
        (round_,) = calibration["measure"](options)["NBL"]
        name = f"{count} layers, {rows * args.length:,} tokens"
        seconds = {"in all": round_["seconds"], "layer": round_["seconds"] / count}
        found.append((f"{name}{what and f' ({what})'}", seconds))
    return found


def print_rates(rows: dict[int, dict[str, float]]) -> None:
    """Print the measured parts, and how they grow from width to width."""
    header = ("d", "forward, s", "statistics, s", "solving, s", "growth with d of each")
    lines = []
    before: tuple[int, dict[str, float]] | None = None
    for d, seconds in rows.items():
        exponents = ""
        if before is not None:
            steps = math.log(d / before[0])
            exponents = ", ".join(
                f"d^{math.log(seconds[name] / before[1][name]) / steps:.2f}"
                for name in seconds
            )
        cells = (f"{value:.3f}" for value in seconds.values())
        lines.append((f"{d:,}", *cells, exponents))
        before = d, seconds
    print(Table(header, lines).to_markdown(), flush=True)


def print_large(rows: dict[int, dict[str, float]], args: argparse.Namespace) -> None:
    """Print what follows for large models from the rates at the largest width."""
    solver = runpy.run_path(str(HERE / "solver.py"))
    d = max(rows)
    shape, seconds = small(d), rows[d]
    tokens = max(1, args.tokens // args.length) * args.length
    rates = {
        "forward": shape.forward(tokens, args.length) / seconds["forward"],
        "sums": shape.sums(tokens) / seconds["sums"],
        "solution": shape.solution / seconds["solution"],
    }
    speeds = ", ".join(f"{n} {r / 1e9:,.0f}" for n, r in rates.items())
    print(f"\nGFLOP/s at d = {d:,}: {speeds}\n")
    header = (
        *("model", "d", "forward, s", "statistics, s", "solving, s", "of a layer, s"),
        *("paper's numerics, s", "of all layers, h"),
    )
    lines = []
    for name, large in LARGE.items():
        parts = [
            large.forward(PAPER_TOKENS, PAPER_LENGTH) / rates["forward"],
            large.sums(PAPER_TOKENS) / rates["sums"],
            large.solution / rates["solution"],
        ]
        cells = [f"{value:,.1f}" for value in (*parts, sum(parts))]
        cells.append(f"{solver['PAPER_SECONDS'][large.d]:.1f}")
        cells.append(f"{large.layers * sum(parts) / 3600:.1f}")
        lines.append((f"{name}, extrapolated", f"{large.d:,}", *cells))
    print(Table(header, lines).to_markdown())


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Measure, then print three markdown tables.

    :param arguments: the command line; None: this process's
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", default="512,1024,2048", help="widths, a list")
    parser.add_argument("--tokens", type=int, default=8192, help="(8192)")
    parser.add_argument("--length", type=int, default=512, help="of a sequence (512)")
    parser.add_argument("--layers", type=int, default=4, help="of the least model (4)")
    parser.add_argument("--repeats", type=int, default=2, help="the best counts (2)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    print(
        f"one layer, {args.tokens:,} tokens in sequences of {args.length}, float32, "
        f"{args.device}, {torch.get_num_threads()} threads, best of {args.repeats}\n"
    )
    rows = {int(d): measure(int(d), args) for d in args.d.split(",")}
    print_rates(rows)
    print_large(rows, args)
    header = ("whole calibration", "in all, s", "of a layer, s")
    lines = [
        (name, *(f"{value:.2f}" for value in seconds.values()))
        for name, seconds in growth(args)
    ]
    print(f"\n{Table(header, lines).to_markdown()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
