# SPDX-License-Identifier: Apache-2.0
"""
Which tokens does a checkpoint lose on? One kind of token may make most of a ratio.

On the held-out windows that paper_table.py measures: for each checkpoint and text the
token whose prediction lost most in all, its part of the text and of the loss, and
the perplexity of the rest, times the base model's::

    python benchmarks/lost_tokens.py --model .cache/models/SmolLM2-135M-Instruct \\
        --calibration c4=c4_demo.json --text wikitext2=wikitext2_test.txt \\
        paper_table/NBL-best-m4/checkpoint paper_table/DROP-m4/checkpoint
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nbl_modifier
from nbl_modifier.evaluation.perplexity import token_nlls
from nbl_modifier.report.table import Table

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.paper_texts import load_windows, named_source

HEADER = (
    *("checkpoint", "text", "times base", "lost most on", "tokens", "of the loss"),
    "times base without it",
)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    add("--model", required=True, metavar="MODEL", help="the base model")
    add("--calibration", type=named_source, required=True, metavar="NAME=FILE")
    add("--text", type=named_source, action="append", default=[], metavar="NAME=FILE")
    add("--samples", type=int, default=128, help="calibration windows (128)")
    add("--heldout-windows", type=int, default=48, help="of each text (48)")
    add("--seq-len", type=int, default=512, help="tokens per window (512)")
    add("--top", type=int, default=1, help="kinds of token to show (1)")
    add("--batch-size", type=int, default=8)
    return parser.parse_args()


def nlls(model: str | Path, windows: Dataset, batch_size: int) -> Tensor:
    """Return the negative log-likelihood of each token, ``[num_tokens]`` in nats."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return torch.cat(token_nlls(loaded, windows, batch_size)).double()


def worst_tokens(lost: Tensor, tokens: Tensor, top: int) -> Iterator[int]:
    """
    Yield the kinds of token that lost most in all, worst first.

    :param lost: of each token of a text, ``[num_tokens]``
    :param tokens: their numbers in the vocabulary, of the same shape
    :param top: how many kinds
    """
    kinds, places = tokens.unique(return_inverse=True)
    sums = lost.new_zeros(len(kinds)).index_add_(0, places, lost)
    yield from kinds[sums.argsort(descending=True)[:top]].tolist()


def rows_of(
    name: str, text: str, lost: Tensor, tokens: Tensor, tokenizer: Any, top: int
) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows of a checkpoint and a text."""
    for kind in worst_tokens(lost, tokens, top):
        here = tokens == kind
        yield (
            *(name, text, f"{math.exp(lost.mean()):.4f}"),
            repr(tokenizer.decode([kind])),
            f"{here.double().mean().item():.1%}",
            f"{(lost[here].sum() / lost.sum()).item():.1%}",
            f"{math.exp(lost[~here].mean()):.4f}",
        )


def main() -> int:
    """Measure and print."""
    args = parse_arguments()
    nbl_modifier.register()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_windows(
        args.calibration,
        args.text,
        tokenizer,
        samples=args.samples,
        heldout_windows=args.heldout_windows,
        seq_len=args.seq_len,
        seed=0,
    ).heldout
    tokens = {
        name: torch.cat([torch.tensor(ids[1:]) for ids in windows["input_ids"]])
        for name, windows in texts.items()
    }
    base = {
        name: nlls(args.model, windows, args.batch_size)
        for name, windows in texts.items()
    }
    rows: list[tuple[str, ...]] = []
    for checkpoint in args.checkpoints:
        name = f"{checkpoint.parent.name}/{checkpoint.name}"
        for text, windows in texts.items():
            lost = nlls(checkpoint, windows, args.batch_size) - base[text]
            rows += rows_of(name, text, lost, tokens[text], tokenizer, args.top)
    print(Table(HEADER, rows).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
