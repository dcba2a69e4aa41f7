# SPDX-License-Identifier: Apache-2.0
"""
Which tokens does a checkpoint lose on? One kind of token may make most of a ratio.

On the held-out windows that paper_table.py measures: for each checkpoint and text the
token whose prediction lost most in all, its part of the text and of the loss, and
the perplexity of the rest, times the base model's; with ``--again``, also of windows
that say their first half again, whose second half shows what the model copies::

    python benchmarks/lost_tokens.py --model .cache/models/SmolLM2-135M-Instruct \\
        --calibration c4=c4_demo.json --text wikitext2=wikitext2_test.txt \\
        paper_table/NBL-best-m4/checkpoint paper_table/DROP-m4/checkpoint
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
    add("--again", action="store_true", help="also what is copied from the context")
    return parser.parse_args()


@dataclass(frozen=True)
class Text:
    """
    Windows, and what of them counts.

    :param windows: rows with ``input_ids``
    :param start: the first token of each window that counts, not the first of all
    """

    windows: Dataset
    start: int = 1

    @property
    def tokens(self) -> Tensor:
        """Those that count, ``[num_tokens]``."""
        ids = self.windows["input_ids"]
        return torch.cat([torch.tensor(window[self.start :]) for window in ids])

    @property
    def said_again(self) -> Text:
        """The first half of each window twice, of which the second one counts."""
        halves = [ids[: len(ids) // 2] for ids in self.windows["input_ids"]]
        twice = Dataset.from_dict({"input_ids": [half * 2 for half in halves]})
        return Text(twice, len(halves[0]))

    def nlls(self, model: str | Path, batch_size: int) -> Tensor:
        """Return the negative log-likelihood of these, ``[num_tokens]`` in nats."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        found = token_nlls(loaded, self.windows, batch_size)
        return torch.cat([nll[self.start - 1 :] for nll in found]).double()


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
    found = load_windows(
        args.calibration,
        args.text,
        tokenizer,
        samples=args.samples,
        heldout_windows=args.heldout_windows,
        seq_len=args.seq_len,
        seed=0,
    ).heldout
    texts = {name: Text(windows) for name, windows in found.items()}
    if args.again:
        texts |= {f"{name}, said again": t.said_again for name, t in texts.items()}
    base = {name: t.nlls(args.model, args.batch_size) for name, t in texts.items()}
    rows: list[tuple[str, ...]] = []
    for checkpoint in args.checkpoints:
        name = f"{checkpoint.parent.name}/{checkpoint.name}"
        for text, each in texts.items():
            lost = each.nlls(checkpoint, args.batch_size) - base[text]
            rows += rows_of(name, text, lost, each.tokens, tokenizer, args.top)
    print(Table(HEADER, rows).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
