# SPDX-License-Identifier: Apache-2.0
"""
The paper's table and figures: what each method keeps of a real model.

Compresses the model with every method at every number of layers, and measures
perplexity, the paper's eight tasks, ten facts and, with ``--serve-python``, speed in
vLLM. Calibration text and held-out text are documents of the same file, the last ones
held out::

    python benchmarks/paper_table.py --model SmolLM2-135M-Instruct --data tasks \\
        --calibration c4=c4_demo.json --text wikitext2=wikitext2_test.txt \\
        --output paper_table

The folder has one JSON file for each model and for each thing measured on it. The same
command goes on where it was interrupted and does what is missing; to do a model again,
delete its folder. ``--render`` measures nothing and writes ``table.md`` and the figures
from what is there, which a run does, too, when it ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
import nbl_modifier.hf
from benchmarks.paper_models import METHODS, Run
from benchmarks.paper_numbers import render, save_table
from benchmarks.paper_results import Results
from benchmarks.paper_texts import named_source
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.cli.options import positive
from nbl_modifier.evaluation import SUITES

MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "pycode-4m"
PARTS = ("perplexity", "facts", "tasks", "speed")
TASKS = [task.name for task in SUITES["paper"]]
SPEED_ARGS = "--context 512 --batch 8 --generate-tokens 64"


def numbers(text: str) -> list[int]:
    """Return positive integers, separated by commas."""
    return [positive(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(MODEL), help="directory or name (default: the bundled)")
    add("--output", type=Path, default=Path("paper_table"), metavar="DIR")
    add("--render", action="store_true", help="only table and figures of what is there")
    what = parser.add_argument_group("what is compared")
    add = what.add_argument
    add("--m", type=numbers, default=[4, 8, 12, 15], help="layers (4,8,12,15)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    add("--keep-checkpoints", action="store_true", help="for parts measured later")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data", type=Path, metavar="DIR", help="JSON lines of tasks (default: hub)")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    add("--tasks-limit", type=positive, metavar="N", help="documents of each task")
    add("--mmlu-shots", type=int, default=5, metavar="N")
    add("--calibration", type=named_source, default=("c4", "c4"), metavar="NAME=FILE")
    add("--samples", type=positive, default=128, help="calibration windows (128)")
    add("--seq-len", type=positive, default=512, help="tokens per window (512)")
    add("--text", type=named_source, action="append", default=[], metavar="NAME=FILE")
    add("--heldout-windows", type=positive, default=48, help="of each text (48)")
    add("--seed", type=int, default=0)
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--threads", type=positive, help="of torch")
    add("--batch-size", type=positive, default=8)
    add("--serve-python", help="Python where vLLM is: measures speed, too")
    add("--speed-args", default=SPEED_ARGS, help=f"of nbl benchmark ({SPEED_ARGS})")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing, then write table and figures."""
    args = parse_arguments()
    show_ours_and_warnings()
    nbl_modifier.hf.register()
    if args.threads:
        torch.set_num_threads(args.threads)
    failed = []
    if not args.render:
        run = Run(args)
        for cell in run.cells():
            try:
                run.measure(cell)
            except (ValueError, RuntimeError, OSError) as err:
                failed.append(cell.name)
                print(f"{cell.name}: {err}", file=sys.stderr, flush=True)
            save_table(run.results, METHODS)
    print(render(save_table(Results(args.output), METHODS), args.output))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
