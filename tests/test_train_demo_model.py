# SPDX-License-Identifier: Apache-2.0
"""The script that the bundled models were trained with, on a model of a few steps."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbl_modifier.evaluation import perplexity
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_demo_model.py"
SIZES = (
    *("--model-type", "qwen3", "--layers", "2", "--hidden", "32", "--heads", "3"),
    *("--kv-heads", "1", "--head-dim", "16", "--mlp", "32", "--vocabulary", "300"),
    *("--positions", "64", "--batch-size", "4", "--seq-length", "32"),
    *("--tokens", "1024", "--threads", "1"),
)
STEPS = 8  # 1024 / (4 x 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with 12 different files, one of them twice, and one too short."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(12):
        lines = [f"value_{i} = {number * i}  # line {i}\n" for i in range(40)]
        (folder / f"module_{number}.py").write_text("".join(lines))
    (folder / "copy.py").write_text((folder / "module_0.py").read_text())
    (folder / "short.py").write_text("x = 1\n")
    return folder


def train(output: Path, source: Path, *more: str, stop_at: int | None = None) -> None:
    """Run the script; ``stop_at`` is the step at which someone presses Ctrl-C."""
    names = runpy.run_path(str(SCRIPT))
    original = names["Run"].train_step

    def train_step(run: Any) -> Any:
        if run.step == stop_at:
            raise KeyboardInterrupt
        return original(run)

    arguments = ("--output", str(output), "--source", str(source), *SIZES, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names["Run"], "train_step", train_step)
        patch.setattr(sys, "argv", ["train_demo_model.py", *arguments])
        assert names["main"]() == 0


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert model.dtype == torch.bfloat16
    return model.state_dict()


def test_model_is_what_was_asked_for(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    train(output, source)
    config = json.loads((output / "config.json").read_text())
    wanted = {"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 32}
    wanted |= {"head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1}
    assert {name: config[name] for name in wanted} == wanted
    assert "12 files" in capsys.readouterr().out
    record = json.loads((output / "training.json").read_text())
    assert record["tokens"] == STEPS * 4 * 32
    tokenizer = AutoTokenizer.from_pretrained(output)
    heldout = pack(stdlib_texts("heldout"), tokenizer, 32, 64)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert record["perplexity"] == perplexity(model, heldout).perplexity
    seen = pack([(source / "module_3.py").read_text()], tokenizer, 32)
    assert perplexity(model, seen).perplexity < 250  # 300 untrained
    stored = json.loads((output / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & stored.keys()
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) == [0, 1]
    text = "def f(x):\n    return 'ä'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert not (tmp_path / "model.training").exists()


def test_interrupted_run_ends_in_the_same_model(tmp_path: Path, source: Path) -> None:
    train(tmp_path / "whole", source)
    with pytest.raises(SystemExit, match="same command continues"):
        train(tmp_path / "parts", source, stop_at=3)
    assert not (tmp_path / "parts").exists()
    (source / "installed_since.py").write_text("x = 1\n" * 100)
    train(tmp_path / "parts", source)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_processes_share_the_batches(tmp_path: Path, source: Path) -> None:
    """Two of them, each with half of every batch, take the same steps as one."""
    train(tmp_path / "one", source)
    arguments = ("--output", str(tmp_path / "two"), "--source", str(source), *SIZES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", "2", str(SCRIPT), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # Gradients are summed in another order; bfloat16 has 8 bits of precision.
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=2**-7, atol=1e-4)


def test_another_seed_gives_another_model(tmp_path: Path, source: Path) -> None:
    train(tmp_path / "a", source)
    train(tmp_path / "b", source, "--seed", "1", "--tokenizer", str(tmp_path / "a"))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not torch.equal(a["lm_head.weight"], b["lm_head.weight"])


def test_state_of_another_run_is_not_continued(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "model"
    with pytest.raises(SystemExit, match="same command continues"):
        train(output, source, stop_at=3)
    with pytest.raises(SystemExit, match="run with other lr"):
        train(output, source, "--lr", "1e-4")


def test_finished_model_is_kept(tmp_path: Path, source: Path) -> None:
    with pytest.raises(SystemExit, match=r"exists\. Pass --overwrite"):
        train(source, source)


def test_standard_library_is_held_out(tmp_path: Path, source: Path) -> None:
    """Neither its folder nor a copy of one of its files is trained on."""
    import textwrap

    documents = runpy.run_path(str(SCRIPT))["documents"]
    before = documents([source])
    (source / "vendored.py").write_text(Path(textwrap.__file__).read_text())
    library = source / "lib" / "python3.99"
    library.mkdir(parents=True)
    (library / "own.py").write_text("y = 2\n" * 100)
    assert documents([source]) == before
    packages = library / "site-packages"
    packages.mkdir()
    (packages / "installed.py").write_text("z = 3\n" * 100)
    assert len(documents([source])) == len(before) + 1
