# SPDX-License-Identifier: Apache-2.0
"""What is printed and written once a checkpoint is saved."""

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.cli.results import (
    perplexity_table,
    print_results,
    update_report,
    weight_bytes,
)
from nbl_modifier.evaluation.perplexity import PerplexityResult
from nbl_modifier.records.compression import NBLReport
from tests.report.report_factory import write_checkpoint


def result(*nlls: float) -> PerplexityResult:
    """Return the perplexity of windows of 100 tokens, each of this mean."""
    mean = math.fsum(nlls) / len(nlls)
    windows = tuple(100 * nll for nll in nlls)
    return PerplexityResult(
        math.exp(mean), mean, 0.0, 100 * len(nlls), windows, (100,) * len(nlls)
    )


FIGURES = {"base": result(1.0, 2.0), "saved checkpoint": result(1.1, 2.1)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "out", [2])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["architectures"] = ["NBLLlamaForCausalLM"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "model.safetensors").write_bytes(bytes(1_500_000))
    (tmp_path / "base").mkdir()
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / "base" / shard).write_bytes(bytes(1_000_000))
    return tmp_path / "out"


def test_perplexities_have_their_ratio_to_the_first() -> None:
    """Both windows lose 0.1 nats a token, so the ratio is known without error."""
    lines = perplexity_table(FIGURES).to_text().splitlines()
    assert lines[0].split("  ")[0] == "perplexity on 200 held-out tokens"
    base, saved = lines[2:]
    assert base.split() == ["base", f"{math.exp(1.5):.3f}"]
    ratio = f"{math.exp(0.1):.4f} +- 0.0000"
    assert saved.endswith(f"{math.exp(1.6):.3f}  {ratio}")


def test_weights_are_all_shards(output: Path) -> None:
    assert weight_bytes(str(output)) == 1_500_000
    assert weight_bytes(str(output.parent / "base")) == 2_000_000


def test_report_and_card_have_the_figures(output: Path) -> None:
    report = update_report(str(output), str(output.parent / "base"), FIGURES)
    evaluation = report.evaluation
    assert evaluation is not None
    assert evaluation["perplexity base"] == pytest.approx(math.exp(1.5))
    assert evaluation["perplexity times base"] == pytest.approx(math.exp(0.1))
    assert evaluation["held-out tokens"] == 200
    assert evaluation["weights in bytes"] == 1_500_000
    assert evaluation["weights of the base model in bytes"] == 2_000_000
    assert NBLReport.load(output / "nbl_report.json") == report
    card = (output / "README.md").read_text("utf-8")
    assert "held-out tokens" in card
    assert f"{math.exp(1.6):,.3f}" in card


def test_figures_that_are_no_numbers_are_left_out(output: Path) -> None:
    """One window has no standard error."""
    figures = {"base": result(1.0), "saved checkpoint": result(1.1)}
    evaluation = update_report(str(output), str(output), figures).evaluation
    assert evaluation is not None
    assert "perplexity times base" in evaluation
    assert "perplexity times base, standard error" not in evaluation


def test_no_matplotlib_is_said_and_no_error(
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    print_results(str(output), str(output.parent / "base"), True, {})
    printed = capsys.readouterr().out
    assert "no plot: " in printed
    assert "weights on disk: 2.00 MB -> 1.50 MB" in printed
    assert "KV cache per token: 75.0% of the base model's" in printed
    assert f"vllm serve {output}" in printed
    assert "where vLLM and nbl-modifier are installed" in printed
