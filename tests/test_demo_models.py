# SPDX-License-Identifier: Apache-2.0
"""The bundled models are as small and as good as their READMEs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbl_modifier.evaluation import perplexity
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parents[1] / "examples" / "models"
MODELS = sorted(path for path in FOLDER.iterdir() if path.is_dir())


def stated(readme: str, pattern: str) -> float:
    """Return the number that the pattern finds."""
    (number,) = re.findall(pattern, readme)
    return float(number)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_bundled_model(path: Path) -> None:
    assert sum(file.stat().st_size for file in path.iterdir()) < 20e6
    readme = (path / "README.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.bfloat16
    count = stated(readme, r"- ([\d.]+) M parameters")
    assert model.num_parameters() / 1e6 == pytest.approx(count, abs=0.005)
    tokenizer = AutoTokenizer.from_pretrained(path)
    heldout = pack(stdlib_texts("heldout"), tokenizer, 256, 64)
    # The text differs between versions of Python; theirs is that of 3.11.7.
    expected = stated(readme, r"- Held-out perplexity [^:]*: ([\d.]+\d)")
    assert perplexity(model, heldout).perplexity == pytest.approx(expected, rel=0.1)
