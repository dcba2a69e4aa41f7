# SPDX-License-Identifier: Apache-2.0
"""What is decided and checked before a run calibrates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier

from tests.llmcompressor_plugin.test_options import run
from tests.tiny_llama import (
    FOUR_BITS,
    load,
    logits_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_groups_that_do_not_fit_the_rank_are_refused_early(
    llama: Path, rows: Dataset
) -> None:
    fitting: dict[str, Any] = {"layers": [1], "rank": 8}

    def quantizer(*ignore: str) -> QuantizationModifier:
        return QuantizationModifier(
            config_groups=FOUR_BITS, ignore=["lm_head", *ignore]
        )

    with pytest.raises(ValueError, match="groups of 32.*linear maps of rank 8"):
        run(llama, rows, quantizer(), **fitting)
    model, _ = run(llama, rows, quantizer("re:.*linear[.]expand$"), **fitting)
    linear = model.model.layers[1].self_attn.linear
    assert hasattr(linear.reduce, "quantization_scheme")
    assert not hasattr(linear.expand, "quantization_scheme")


def test_linearized_in_two_runs_of_different_kinds(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(llama, rows, out=first, kind="block", layers=[1])
    dropped, report = run(first, rows, out=second, method="drop", layers=[3])
    assert report.selected_layers == [1, 3]
    block = json.loads((second / "config.json").read_text())["nbl_config"]
    kinds = {i: (e["kind"], e["method"]) for i, e in block["layers"].items()}
    assert kinds == {"1": ("block", "linear"), "3": ("attention", "drop")}
    assert torch.equal(logits_of(load(second)), logits_of(dropped))
    third = tmp_path / "third"
    shorter, _ = run(second, rows, out=third, kind="block", method="drop", layers=[0])
    assert shorter.config.num_hidden_layers == 3
    assert sorted(shorter.config.linearized_layers()) == [0, 2]
    assert torch.equal(logits_of(load(third)), logits_of(shorter))


@pytest.mark.parametrize("kind", ["attention", "block"])
def test_statistics_serve_every_method_of_their_kind(
    llama: Path, rows: Dataset, tmp_path: Path, kind: str
) -> None:
    kept = str(tmp_path / "statistics")
    run(llama, rows, kind=kind, layers=[0, 2], statistics=kept)
    variants: list[dict[str, Any]] = [{}, {"rank": 8}, {"method": "drop"}]
    for fields in variants:
        fresh, _ = run(llama, rows, kind=kind, layers=[0, 2], **fields)
        reused, _ = run(
            llama, rows, kind=kind, layers=[0, 2], statistics=kept, **fields
        )
        # what was held out is pooled again: sums in another order
        torch.testing.assert_close(
            logits_of(reused), logits_of(fresh), rtol=0, atol=1e-4
        )
    other = "block" if kind == "attention" else "attention"
    with pytest.raises(ValueError, match=f"kind {kind}.*needs? {other}|has {other}"):
        run(llama, rows, kind=other, layers=[0, 2], statistics=kept)
