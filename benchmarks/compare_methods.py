# SPDX-License-Identifier: Apache-2.0
"""
The paper's comparison: every method on the same model, text and number of layers.

Every row but SliceGPT's is a recipe, run through oneshot(), saved and loaded again; the
checkpoint is what is measured. Perplexity has one standard error, and so has its ratio
to the base model's, over windows compared in pairs. ``--tasks`` adds ``nbl evaluate``'s
offline suite::

    python benchmarks/compare_methods.py --m 2,4,6,8 --tasks

SliceGPT keeps the KV cache whatever it cuts, so it is given the parameters of
"NBL (best)" at each m, or as many as it takes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

sys.path.append(str(Path(__file__).parents[1]))
import nbl_modifier.hf
from benchmarks.methods import (
    BASE,
    BEST,
    PAPER,
    RECIPES,
    SLICED,
    compress,
    layers_with_cache,
    load,
    slug,
    with_error,
)
from benchmarks.slicegpt import slice_model, widest_within
from nbl_modifier import NBLModifier
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.evaluation import (
    PerplexityResult,
    evaluate_model,
    load_tasks,
    perplexity,
)
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport

MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "pycode-4m"


@dataclass(frozen=True)
class Row:
    """
    One model of the table.

    :param method: its name in the table
    :param m: layers, or blocks, that were replaced; 0 for the base model
    :param layers: which ones, by index in the base model
    :param perplexity: on held-out windows
    :param perplexity_error: its standard error
    :param ratio: perplexity over the base model's
    :param ratio_error: its standard error, windows compared in pairs
    :param num_parameters: weights of the model, tied ones once
    :param kv_cache: layers with a KV cache over those of the base model
    :param tasks: score and its standard error by lm-eval task, if asked for
    """

    method: str
    m: int
    layers: list[int]
    perplexity: float
    perplexity_error: float
    ratio: float
    ratio_error: float
    num_parameters: int
    kv_cache: float
    tasks: dict[str, tuple[float, float | None]]


class Comparison:
    """
    The rows, made one by one.

    :param args: of the command line
    :param folder: for the checkpoints
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self._calibration = self._windows("calibration", args.num_samples)
        self._heldout = self._windows("heldout", args.heldout_samples)
        self._tasks = load_tasks("offline") if args.tasks else []
        model = load(args.model)
        self._num_layers = layers_with_cache(model.config)
        self._base = self._perplexity(model)

    def rows(self) -> Iterator[Row]:
        """Measure each method at each m, the base model first."""
        yield self._row(BASE, 0, [], load(self._args.model))
        for m in self._args.m:
            budget = None
            for method, fields in RECIPES.items():
                if method in self._args.methods:
                    row = self._compressed(method, fields, m)
                    budget = row.num_parameters if method == BEST else budget
                    yield row
            if SLICED in self._args.methods and budget is not None:
                yield self._sliced(m, budget)

    def _windows(self, split: Literal["calibration", "heldout"], count: int) -> Dataset:
        return pack(stdlib_texts(split), self._tokenizer, self._args.seq_length, count)

    def _compressed(self, method: str, fields: dict[str, Any], m: int) -> Row:
        directory = self._folder / f"{slug(method)}-{m}"
        compress(
            load(self._args.model),
            self._tokenizer,
            self._calibration,
            NBLModifier(num_layers=m, **fields),
            directory,
            self._folder,
            batch_size=self._args.batch_size,
            seed=self._args.seed,
        )
        report = NBLReport.load(directory / REPORT_FILE_NAME)
        return self._row(method, m, report.selected_layers, load(directory))

    def _sliced(self, m: int, num_parameters: int) -> Row:
        model = load(self._args.model)
        tokens = torch.tensor(self._calibration["input_ids"])
        width = widest_within(model, num_parameters)
        slice_model(model, tokens.split(self._args.batch_size), width)
        return self._row(SLICED, m, [], model)

    def _row(
        self, method: str, m: int, layers: list[int], model: PreTrainedModel
    ) -> Row:
        result = self._perplexity(model)
        ratio, error = result.relative_to(self._base)
        return Row(
            method=method,
            m=m,
            layers=layers,
            perplexity=result.perplexity,
            perplexity_error=result.perplexity * result.nll_standard_error,
            ratio=ratio,
            ratio_error=error,
            num_parameters=sum(weight.numel() for weight in model.parameters()),
            kv_cache=layers_with_cache(model.config) / self._num_layers,
            tasks=self._scores(model),
        )

    def _scores(self, model: PreTrainedModel) -> dict[str, tuple[float, float | None]]:
        if not self._tasks:
            return {}
        scores = evaluate_model(
            model, self._tokenizer, self._tasks, batch_size=self._args.batch_size
        )
        return {
            f"{name} {task.metric}": (task.score.value, task.score.stderr)
            for name, task in scores.items()
        }

    def _perplexity(self, model: PreTrainedModel) -> PerplexityResult:
        return perplexity(model, self._heldout, self._args.batch_size)


def recovered(row: Row, rows: Sequence[Row]) -> float | None:
    """
    Return the part of NBL (paper)'s loss of perplexity that a row does not have.

    :param row: of any method but the base model
    :param rows: all of them
    """
    base = next(other for other in rows if other.method == BASE)
    paper = [other for other in rows if (other.method, other.m) == (PAPER, row.m)]
    if not paper or row.method == BASE:
        return None
    lost = paper[0].perplexity - base.perplexity
    return (paper[0].perplexity - row.perplexity) / lost


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown."""
    tasks = list(rows[0].tasks)
    header = (
        ("m", "method", "perplexity", "times base", "of NBL (paper)'s loss avoided")
        + tuple(tasks)
        + ("parameters", "KV cache", "layers")
    )
    rule = ("---:", "---") + ("---:",) * (len(header) - 3) + ("---",)
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|"]
    for row in rows:
        share = recovered(row, rows)
        cells = (
            str(row.m or ""),
            row.method,
            f"{row.perplexity:.2f} ± {row.perplexity_error:.2f}",
            f"{row.ratio:.4f} ± {row.ratio_error:.4f}",
            "" if share is None else f"{share:.0%}",
            *(with_error(*row.tasks[task]) for task in tasks),
            f"{row.num_parameters:,}",
            f"{row.kv_cache:.1%}",
            " ".join(map(str, row.layers)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    methods = [*RECIPES, SLICED]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(MODEL))
    add(
        "--m",
        default="2,4,6,8",
        type=lambda text: [int(part) for part in text.split(",")],
        help="how many layers to replace, separated by commas",
    )
    add("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    add("--num-samples", type=int, default=256)
    add("--heldout-samples", type=int, default=256)
    add("--seq-length", type=int, default=256)
    add("--batch-size", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--tasks", action="store_true", help="nbl evaluate's offline suite, too")
    add("--output", type=Path, help="folder for table.md and rows.json")
    return parser.parse_args()


def main() -> int:
    """Measure, print and save."""
    args = parse_arguments()
    show_ours_and_warnings()
    nbl_modifier.hf.register()
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for row in Comparison(args, Path(temporary)).rows():
            rows.append(row)
            figures = f"{row.perplexity:.3f}, {row.ratio:.4f} +- {row.ratio_error:.4f}"
            print(f"m = {row.m}, {row.method}: {figures} times base", flush=True)
    print(f"\n{table(rows)}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
        content = [asdict(row) | {"recovered": recovered(row, rows)} for row in rows]
        (args.output / "rows.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
