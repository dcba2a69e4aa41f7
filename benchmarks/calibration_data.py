# SPDX-License-Identifier: Apache-2.0
"""
How much does it matter which text calibrates? The paper's table F.1, for any texts.

Calibrates on each text in turn and measures perplexity on held-out windows of all of
them. Two texts are always there: ``code``, the standard library's source, and
``prose``, the manual that comes with it (``pydoc_data.topics``). Others are files::

    python benchmarks/calibration_data.py --text c4=c4_demo.json \\
        --text wikitext=wikitext2_valid.txt
"""

import argparse
import math
import pydoc_data.topics
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nbl_modifier import NBLModifier
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import load_texts, stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.report.table import Table

MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "pycode-4m"


@dataclass(frozen=True)
class Text:
    """
    A text in windows.

    :param name: in the tables
    :param calibration: windows to calibrate on, one set per draw
    :param heldout: windows to measure perplexity on, none of the others
    """

    name: str
    calibration: list[Dataset]
    heldout: Dataset


def code(args: argparse.Namespace, tokenizer: Any) -> Text:
    """Return the standard library, in the halves that it has everywhere else."""
    calibration = [
        pack(
            stdlib_texts("calibration", seed),
            tokenizer,
            args.seq_length,
            args.num_samples,
        )
        for seed in range(args.seeds)
    ]
    windows = pack(stdlib_texts("heldout"), tokenizer, args.seq_length)
    return Text("code", calibration, draw(windows, args.heldout_samples, 0))


def other(
    name: str, texts: list[str], args: argparse.Namespace, tokenizer: Any
) -> Text:
    """Return documents: the first half is calibrated on, the second one measured."""
    windows = pack(texts, tokenizer, args.seq_length)
    middle = len(windows) // 2
    first = windows.select(range(middle))
    second = windows.select(range(middle, len(windows)))
    calibration = [draw(first, args.num_samples, seed) for seed in range(args.seeds)]
    return Text(name, calibration, draw(second, args.heldout_samples, 0))


def draw(windows: Dataset, count: int, seed: int) -> Dataset:
    """Return ``count`` windows drawn by ``seed``, or all in another order."""
    return windows.shuffle(seed=seed).select(range(min(count, len(windows))))


def prose() -> list[str]:
    """Return the manual's topics, by name."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def load(args: argparse.Namespace) -> PreTrainedModel:
    """Return the base model."""
    return AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")


def linearize(args: argparse.Namespace, windows: Dataset) -> PreTrainedModel:
    """Return the model after NBL, calibrated on ``windows``."""
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    return oneshot(
        model=load(args),
        processor=tokenizer,
        dataset=windows,
        recipe=NBLModifier(num_layers=args.num_layers),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        batch_size=8,
    )


def replaced(model: PreTrainedModel) -> list[int]:
    """Return the layers that were replaced."""
    return sorted(model.config.nbl_config["layers"], key=int)


def cell(
    results: Sequence[PerplexityResult], base: PerplexityResult
) -> tuple[float, float]:
    """
    Return the mean over seeds of the ratio to the base model, and its standard error.

    :param results: one per seed, on the same windows as ``base``. Their errors over
        windows are one and the same draw of windows, so that they do not average out;
        those over calibration text do.
    """
    pairs = [result.relative_to(base) for result in results]
    ratios = [ratio for ratio, _ in pairs]
    over_windows = statistics.fmean(error for _, error in pairs)
    over_seeds = (
        statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    )
    return statistics.fmean(ratios), math.hypot(over_windows, over_seeds)


def measure(args: argparse.Namespace, texts: Sequence[Text]) -> None:
    """Calibrate on each text with each seed, and print the tables."""
    base = {
        text.name: perplexity(load(args), text.heldout, batch_size=8) for text in texts
    }
    runs = [(text, seed) for text in texts for seed in range(args.seeds)]
    results: dict[str, list[dict[str, PerplexityResult]]] = {t.name: [] for t in texts}
    layers: dict[str, list[list[int]]] = {text.name: [] for text in texts}
    for text, seed in tqdm(runs, "calibrations"):
        model = linearize(args, text.calibration[seed])
        layers[text.name].append(replaced(model))
        results[text.name].append(
            {each.name: perplexity(model, each.heldout, batch_size=8) for each in texts}
        )
    print_tables(args, texts, base, results, layers)


def print_tables(
    args: argparse.Namespace,
    texts: Sequence[Text],
    base: dict[str, PerplexityResult],
    results: dict[str, list[dict[str, PerplexityResult]]],
    layers: dict[str, list[list[int]]],
) -> None:
    """Print perplexities times base, and the layers that were chosen."""
    names = [text.name for text in texts]
    windows = len(texts[0].calibration[0])
    print(
        f"\n{args.num_layers} layers replaced, {windows} x {args.seq_length} tokens, "
        f"mean of {args.seeds} draws\n"
    )
    header = ("calibrated on", *(f"on {name}" for name in names))
    figures = (f"{base[name].perplexity:.2f}" for name in names)
    rows = [("perplexity of the base model", *figures)]
    for calibrated in names:
        row = []
        for measured in names:
            value, error = cell(
                [each[measured] for each in results[calibrated]], base[measured]
            )
            row.append(f"{value:.4f} ± {error:.4f}")
        rows.append((calibrated, *row))
    print(Table(header, rows).to_markdown())
    chosen = [
        (name, "; ".join(", ".join(map(str, each)) for each in layers[name]))
        for name in names
    ]
    header = ("calibrated on", "layers replaced, draw by draw")
    print(f"\n{Table(header, chosen).to_markdown()}")


def named_file(argument: str) -> tuple[str, str]:
    """Split ``NAME=FILE``."""
    name, separator, path = argument.partition("=")
    if not separator or not name or not Path(path).exists():
        raise argparse.ArgumentTypeError("must be NAME=FILE, a file that is there")
    return name, path


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", action="append", type=named_file, default=[])
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--heldout-samples", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument(
        "--seeds", type=int, default=3, help="draws of calibration text"
    )
    args = parser.parse_args()
    show_ours_and_warnings()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = [(name, load_texts(path, "heldout")) for name, path in args.text]
    texts = [
        other(name, documents, args, tokenizer)
        for name, documents in [("prose", prose()), *files]
    ]
    measure(args, [code(args, tokenizer), *texts])
    return 0


if __name__ == "__main__":
    sys.exit(main())
