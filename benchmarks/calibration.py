# SPDX-License-Identifier: Apache-2.0
"""
Time NBL's calibration against a plain forward pass over the same tokens.

A randomly initialised Llama, alternating in one process:

- forward: ``model(input_ids)`` as transformers runs it by default (sdpa, KV cache,
  logits of every token), under no_grad
- pipeline: what llm-compressor's sequential pipeline takes to pass the data once, for a
  modifier that does nothing (activations cached between layers, no logits, and eager
  attention, where NBL has the model's own)
- NBL: a whole oneshot() with NBLModifier (checks, hooks, statistics, solve, replace),
  nothing saved
- the same if it let the pipeline run every layer a second time to propagate changes, as
  llm-compressor does for quantizers

and then the solver of one layer against the reference's algorithm; run as

    python benchmarks/calibration.py
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import runpy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
if __name__ == "__main__":
    # Read when the packages are imported: no progress bars and logs of the timed runs.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.random_llama import adding, llama_config
from nbl_modifier import NBLModifier
from nbl_modifier.benchmark.timing import now

TOKENIZER = Path(__file__).parents[1] / "examples" / "models" / "pycode-4m"


class Pass(Modifier):
    """Asks for the calibration data and does nothing with it."""

    requires_calibration_data: bool = True

    def on_initialize(self, state: State, **kwargs: Any) -> bool:  # noqa: ARG002
        """Have nothing to prepare."""
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:  # noqa: ARG002
        """Have nothing to undo."""
        return True


class SecondPassNBLModifier(NBLModifier):
    """Lets the pipeline run every layer again, which NBL otherwise switches off."""

    def on_calibration_start(self, *args: Any, **kwargs: Any) -> None:
        """Leave the pipeline's arguments alone."""
        self._dataset_args = None
        super().on_calibration_start(*args, **kwargs)


class Benchmark:
    """
    One model and one calibration set.

    :param args: the command line
    :param folder: where oneshot() looks for the model's config
    """

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        torch.manual_seed(0)
        config = llama_config(args)
        config.save_pretrained(folder)
        with torch.device(args.device):  # 8B weights are made in no time on a GPU
            model = AutoModelForCausalLM.from_config(config, dtype=args.dtype)
        self.model: Any = model.eval()
        self.model.config._name_or_path = folder
        tokens = torch.randint(0, args.vocab_size, (args.samples, args.length))
        self.batches = tokens.to(args.device).split(args.batch_size)
        self.dataset = Dataset.from_dict(
            {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens)}
        )
        self.args = args
        self.tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)

    def forward(self) -> dict[str, float]:
        """Run the model over the calibration set."""
        started_at = now(self.args.device)
        with torch.no_grad():
            for batch in self.batches:
                self.model(input_ids=batch)
        return {"seconds": now(self.args.device) - started_at}

    def pipeline(self) -> dict[str, float]:
        """Run llm-compressor's pipeline without statistics."""
        return {"seconds": self._oneshot(Pass(), propagate_error=False)}

    def nbl(self) -> dict[str, float]:
        """Run NBL; also return what its statistics and solutions took."""
        return self._nbl(NBLModifier)

    def second_pass(self) -> dict[str, float]:
        """Run NBL with the pipeline's propagation pass."""
        return self._nbl(SecondPassNBLModifier)

    def _nbl(self, kind: type[NBLModifier]) -> dict[str, float]:
        fields: dict[str, Any] = {"num_layers": self.args.num_layers}
        if self.args.input is not None:
            fields["input"] = self.args.input
        modifier = kind(**(fields | self.args.modifier))
        seconds = self._oneshot(modifier)
        assert modifier.report is not None
        own = sum(layer.seconds for layer in modifier.report.layers)
        return {"seconds": seconds, "own": own, "passes": modifier._run.progress.passes}

    def _oneshot(self, recipe: Modifier, **kwargs: Any) -> float:
        model = copy.deepcopy(self.model)
        started_at = now(self.args.device)
        oneshot(
            model=model,
            processor=self.tokenizer,
            dataset=self.dataset,
            recipe=recipe,
            num_calibration_samples=self.args.samples,
            max_seq_length=self.args.length,
            batch_size=self.args.batch_size,
            shuffle_calibration_samples=False,
            **kwargs,
        )
        return now(self.args.device) - started_at


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """
    Return the figures of each round by what was measured, after a warm-up round.

    :param args: the command line
    """
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Benchmark(args, folder)
        steps: dict[str, Callable[[], dict[str, float]]] = {
            "forward": bench.forward,
            "pipeline": bench.pipeline,
            "NBL": bench.nbl,
            "second pass": bench.second_pass,
        }
        if args.quick:
            del steps["pipeline"], steps["second pass"]
        whole = bench.batches, bench.dataset, args.samples
        # One batch each, but for NBL, which wants more tokens than dimensions, beside
        # those that it holds out.
        args.samples = min(args.samples, 2 + 2 * args.hidden_size // args.length)
        bench.batches = bench.batches[:1]
        for step in steps.values():
            step()
        bench.batches, bench.dataset, args.samples = whole
        for _ in range(args.repeats):
            for name, step in steps.items():
                results.setdefault(name, []).append(step())
    return results


def summary(values: list[float], unit: str = "s") -> str:
    """Return median, minimum and maximum."""
    median = statistics.median(values)
    return f"{median:8.2f} {unit} ({min(values):.2f}..{max(values):.2f})"


def print_calibration(args: argparse.Namespace) -> None:
    """Measure and print the calibration's part."""
    print(
        f"Llama, {args.layers} layers, hidden size {args.hidden_size}, MLP "
        f"{args.intermediate_size}, {args.heads}/{args.kv_heads} heads, vocabulary "
        f"{args.vocab_size}, {args.dtype}; {args.samples} x {args.length} tokens, "
        f"batch {args.batch_size}, {args.device}, {torch.get_num_threads()} threads, "
        f"{args.repeats} rounds, median (min..max)"
    )
    results = measure(args)
    seconds = {name: [r["seconds"] for r in rounds] for name, rounds in results.items()}
    labels = {
        "forward": "(a) plain forward pass",
        "pipeline": "    pipeline without statistics",
        "NBL": "(b) NBL calibration",
        "second pass": "    with the propagation pass",
    }
    for name in seconds:
        print(f"{labels[name]:34s}{summary(seconds[name])}")
    own = [r["own"] for r in results["NBL"]]
    print(f"{'    of which statistics and solve':34s}{summary(own)}")
    for name, label in (
        ("NBL", "b/a"),
        ("pipeline", "pipeline/a"),
        ("second pass", "with propagation pass/a"),
    ):
        if name not in seconds:
            continue
        # Of neighbours in time: what else the machine does changes slowly.
        pairs = zip(seconds[name], seconds["forward"], strict=True)
        ratios = [mine / plain for mine, plain in pairs]
        print(f"{label:34s}{summary(ratios, 'x')}")
        if name == "NBL" and args.modifier:
            passes = statistics.median(r["passes"] for r in results["NBL"])
            each = [ratio / passes for ratio in ratios]
            print(
                f"{f'    for each of its {passes:.1f} passes':34s}{summary(each, 'x')}"
            )


def print_solver(d: int, device: str, repeats: int) -> None:
    """Measure and print the solver's part."""
    solver = runpy.run_path(str(Path(__file__).with_name("solver.py")))
    result = solver["measure"](d, device, repeats)
    print(
        f"\nsolver of one layer, d={d}, float64 {device}, {result['threads']} threads, "
        f"{repeats} rounds, median (min..max)"
    )
    labels = {
        "ours": "Cholesky",
        "reference": "eigh + SVD, inverse",
        "reference_calls": "reference's calls",
    }
    for name, seconds in result["seconds"].items():
        print(f"{labels[name]:34s}{summary(seconds)}")
    for name, ratio in result["ratio"].items():
        print(f"{labels[name] + ' / Cholesky':34s}{ratio:8.1f} x")


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    add = adding(
        parser,
        hidden_size=1024,
        intermediate_size=3584,  # 3.5 d as in Llama 3
        layers=8,
        heads=16,
        kv_heads=4,
        vocab_size=32000,
    )
    add("--samples", 64, "calibration sequences")
    add("--length", 512, "tokens per sequence")
    add("--batch-size", 1, "sequences per forward pass")
    add("--dtype", "float32", "of the model")
    add("--device", "cpu", "cpu or an accelerator")
    add("--num-layers", 4, "layers to replace")
    parser.add_argument(
        "--input",
        choices=["residual", "normalized"],
        help="what the maps read (the modifier's default)",
    )
    parser.add_argument(
        "--modifier",
        type=json.loads,
        default={},
        metavar="JSON",
        help='more fields of NBLModifier, such as \'{"preset": "best"}\'',
    )
    add("--repeats", 3, "rounds")
    parser.add_argument("--quick", action="store_true", help="only (a) and (b)")
    add("--solver-d", 2048, "d for the solver; 0 leaves it out")
    return parser.parse_args()


def main() -> None:
    """Parse the command line, measure, print."""
    args = parse_args()
    print_calibration(args)
    if args.solver_d:
        print_solver(args.solver_d, args.device, args.repeats)


if __name__ == "__main__":
    main()
