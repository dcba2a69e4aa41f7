# SPDX-License-Identifier: Apache-2.0
"""
What a number of linear attention layers should gain on this machine, or on any.

Measures the peaks of this machine (or takes those given), reads the shape of a model
from its config.json, and prints how much faster it would read prompts and generate with
some of its attention layers linear, if only bytes and floating-point operations took
time. The model of time is nbl_modifier/benchmark/roofline.py; docs/performance.md
explains it.

    python benchmarks/roofline.py examples/models/pycode-4m --linearized 4,8

for an H100, by its data sheet:

    python benchmarks/roofline.py MODEL --linearized 12 --tflops 989 --gbytes 3350
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from nbl_modifier.benchmark.peaks import measure_peaks
from nbl_modifier.benchmark.roofline import (
    Kernel,
    Machine,
    ModelShape,
    Product,
    decode_works,
    prefill_works,
    total_seconds,
)
from nbl_modifier.benchmark.shapes import Model, load_model


def linearized(model: Model, hidden_size: int, count: int) -> ModelShape:
    """
    Return the shape with the last ``count`` attention layers linear.

    :param model: without linear layers
    :param hidden_size: width of the linear maps
    :param count: how many
    """
    shape = model.shape
    replaced = range(model.num_layers - count, model.num_layers)
    names = tuple(f"model.layers.{index}.self_attn." for index in replaced)
    kept = tuple(p for p in shape.products if not p.name.startswith(names))
    maps = tuple(
        Product(
            f"{name}linear",
            hidden_size,
            hidden_size,
            float(hidden_size**2 * shape.activation_bytes),
        )
        for name in names
    )
    return replace(
        shape,
        products=kept + maps,
        attentions=shape.attentions[: model.num_layers - count],
    )


def row(
    shapes: list[ModelShape], machine: Machine, context: int, batch: int, kernel: Kernel
) -> str:
    """Return a line of ratios: prefill and decode of each shape to the first."""
    prefill = [
        total_seconds(
            prefill_works(shape, batch=batch, context=context, kernel=kernel), machine
        )
        for shape in shapes
    ]
    decode = [
        total_seconds(
            decode_works(shape, batch=batch, context=context, kernel=kernel), machine
        )
        for shape in shapes
    ]
    cells = [f"{context:,}", str(batch)]
    cells += [f"{batch * context / prefill[0]:,.0f}", f"{batch / decode[0]:,.1f}"]
    for seconds in (prefill, decode):
        cells += [f"{seconds[0] / each:.3f}" for each in seconds[1:]]
    return "| " + " | ".join(cells) + " |"


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="directory or name; only config.json is read")
    add("--linearized", default="4,8,12", help="how many layers, a list (4,8,12)")
    add("--context", default="512,2048,8192,32768", help="tokens, a list")
    add("--batch", default="1,8,64", help="sequences, a list")
    add("--kernel", choices=[k.value for k in Kernel], default=Kernel.PAGED.value)
    add("--dtype", default="auto", help="of weights and activations")
    add("--device", default="cpu", help="whose peaks to measure (cpu)")
    add("--tflops", type=float, help="peak, 10^12 operations per second, not measured")
    add("--gbytes", type=float, help="bandwidth, 10^9 bytes per second, not measured")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Return a list of numbers that commas separate."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure the machine, predict, print a markdown table."""
    args = parse_args()
    model = load_model(args.model, args.dtype, random_weights=True)
    machine = Machine(args.tflops or 0, args.gbytes or 0)
    if args.tflops is None or args.gbytes is None:
        dtype: Any = getattr(torch, model.dtype)
        machine = measure_peaks(args.device, dtype, model.shape.weight_bytes)
    if args.tflops is not None:
        machine = replace(machine, flops_per_second=args.tflops * 1e12)
    if args.gbytes is not None:
        machine = replace(machine, bytes_per_second=args.gbytes * 1e9)
    counts = numbers(args.linearized)
    hidden_size = next(p.inputs for p in model.shape.products if p.last_only)
    shapes = [model.shape]
    shapes += [linearized(model, hidden_size, count) for count in counts]
    print(
        f"{args.model}, {model.num_layers} layers, {model.dtype}, {args.kernel} "
        f"attention; {machine.flops_per_second / 1e9:,.0f} GFLOP/s, "
        f"{machine.bytes_per_second / 1e9:,.1f} GB/s, {torch.get_num_threads()} "
        "threads. Speeds and ratios are predictions.\n"
    )
    header = ["context", "batch", "base prefill tokens/s", "base decode tokens/s"]
    header += [f"{phase} m={m}" for phase in ("prefill", "decode") for m in counts]
    print("| " + " | ".join(header) + " |")
    print("|" + "---:|" * len(header))
    for context in numbers(args.context):
        for batch in numbers(args.batch):
            print(row(shapes, machine, context, batch, Kernel(args.kernel)))


if __name__ == "__main__":
    main()
