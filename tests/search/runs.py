# SPDX-License-Identifier: Apache-2.0
"""Runs that the tests of the search share, and what they measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.layer_statistics.windows import Batch
from nbl_modifier.records.compression import LayerResult, NBLReport
from tests.tiny_llama import (
    Model,
    compress,
    load,
)

# Of 16 sequences, one batch each, these are held out.
HELD_OUT = [2, 6, 10, 14]


FITTED = [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]


def run(
    folder: Path, rows: Dataset, model: Model | None = None, **fields: Any
) -> tuple[Model, NBLReport]:
    modifier = NBLModifier(**fields)
    model = compress(model or load(folder), modifier, rows)
    assert modifier.report is not None
    return model, modifier.report


def layer(report: NBLReport, index: int) -> LayerResult:
    return next(result for result in report.layers if result.index == index)


def mean_nll(model: Model, rows: Dataset, masks: Sequence[Any] | None = None) -> float:
    """Return the mean negative log-likelihood of all tokens but the first, in nats."""
    total, count = 0.0, 0
    for number, tokens in enumerate(rows["input_ids"]):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        logs = logits.double().log_softmax(-1)
        for position in range(1, len(tokens)):
            if masks is None or masks[number][position]:
                total -= float(logs[position - 1, tokens[position]])
                count += 1
    return total / count


def padded_batches(count: int = 8) -> list[Batch]:
    """Return batches of two windows of 24 tokens, 5 of the first one padding."""
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = []
    for _ in range(count):
        tokens = torch.randint(2, 128, (2, 24), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches
