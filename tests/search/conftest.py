# SPDX-License-Identifier: Apache-2.0
"""Reports and texts that the tests of the search share."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.records.compression import NBLReport
from tests.search.runs import run
from tests.tiny_llama import (
    demo_tokenizer,
)


@pytest.fixture(scope="module")
def everything(llama: Path, rows: Dataset) -> NBLReport:
    """Return a report with every figure measured, held-out ones too."""
    return run(llama, rows, criterion="loss", num_layers=4)[1]


@pytest.fixture(scope="module")
def windows() -> Dataset:
    """Return Python source for the demo model, to which every replacement does harm."""
    texts = stdlib_texts("calibration")
    return pack(texts, demo_tokenizer(), seq_length=128, num_sequences=16)
