# SPDX-License-Identifier: Apache-2.0
"""benchmarks/lost_tokens.py: which kinds of token a checkpoint loses on."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import lost_tokens
from benchmarks.paper_texts import load_windows
from nbl_modifier import NBLModifier
from nbl_modifier.evaluation import perplexity
from nbl_modifier.evaluation.perplexity import token_nlls
from nbl_modifier.evaluation.texts import stdlib_texts
from tests.tiny_llama import DEMO_MODEL, compress, demo_tokenizer, load, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_worst_are_those_that_lost_most_in_all() -> None:
    tokens = torch.tensor([5, 7, 5, 9, 7, 3])
    lost = torch.tensor([0.5, 2.0, 0.75, 3.0, -1.5, 0.0]).double()
    assert list(lost_tokens.worst_tokens(lost, tokens, 3)) == [9, 5, 7]


def test_nlls_are_those_of_each_token(llama: Path) -> None:
    """Windows of several lengths, against log-softmax by hand."""
    windows = [token_rows(3)["input_ids"][i][:n] for i, n in enumerate((9, 1, 5))]
    model = load(llama)
    found = token_nlls(model, windows)
    assert [len(nll) for nll in found] == [8, 4]
    for nll, window in zip(found, (windows[0], windows[2]), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0]
        expected = -logits.log_softmax(-1)[range(len(window) - 1), window[1:]]
        assert torch.allclose(nll, expected, atol=1e-5)


def test_table_of_a_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, text = tmp_path / "paper" / "drop", tmp_path / "text.json"
    recipe = [NBLModifier(method="drop", layers=[2, 9])]
    compress(load(DEMO_MODEL), recipe, token_rows(4), output_dir=checkpoint)
    text.write_text(json.dumps([{"text": each} for each in stdlib_texts("heldout")]))
    sizes = {"samples": 4, "heldout_windows": 4, "seq_len": 64}
    options = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    arguments = ["--model", str(DEMO_MODEL), "--calibration", f"code={text}", *options]
    argv = ["lost_tokens.py", str(checkpoint), *arguments, "--again"]
    monkeypatch.setattr(sys, "argv", argv)
    assert lost_tokens.main() == 0
    printed = capsys.readouterr().out
    row, again = re.findall(r"^\| paper/drop .*$", printed, re.MULTILINE)
    _, _, name, ratio, token, tokens, loss, rest, _ = map(str.strip, row.split("|"))
    assert name == "code"
    assert token[0] == token[-1] == "'"
    windows = load_windows(
        ("code", str(text)), [], demo_tokenizer(), seed=0, **sizes
    ).heldout["code"]
    after, before = (
        perplexity(load(path), windows) for path in (checkpoint, DEMO_MODEL)
    )
    assert float(ratio) == pytest.approx(after.relative_to(before)[0], abs=1e-4)
    # what is lost is lost on this token or on the others
    part, of_tokens = float(loss[:-1]) / 100, float(tokens[:-1]) / 100
    others = (1 - part) * math.log(float(ratio)) / (1 - of_tokens)
    assert float(rest) == pytest.approx(math.exp(others), abs=5e-3)
    assert 0 < part <= 1
    assert again.split("|")[2].strip() == "code, said again"
    twice = [(ids[:32] * 2) for ids in windows["input_ids"]]
    second = [
        torch.cat([nll[31:] for nll in token_nlls(load(path), twice)]).double().mean()
        for path in (checkpoint, DEMO_MODEL)
    ]
    expected = math.exp(second[0] - second[1])
    assert float(again.split("|")[3]) == pytest.approx(expected, abs=1e-4)
