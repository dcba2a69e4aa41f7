# SPDX-License-Identifier: Apache-2.0
"""``nbl evaluate`` on small models, and everything it refuses beforehand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbl_modifier.cli import main
from tests.tiny_llama import DEMO_MODEL

SMALL = ["--tasks", "nbl_stdlib_perplexity,nbl_stdlib_next_line", "--limit", "3"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two random models of the bundled tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("evaluate")
    paths = folder / "base", folder / "compressed"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / name, path)
    return paths


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keep scores in a folder of the test's own."""
    monkeypatch.setenv("NBL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def evaluate(models: tuple[Path, Path], *options: str) -> int:
    """Run the command."""
    base, compressed = map(str, models)
    return main(["evaluate", compressed, "--baseline", base, *SMALL, *options])


def test_table_json_and_kept_scores(
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(models, "--output", str(tmp_path)) == 0
    first = capsys.readouterr()
    assert "kept scores" not in first.err
    content = json.loads((tmp_path / "nbl_evaluation.json").read_text())
    assert content["backend"] == "hf"
    assert content["limit"] == 3
    assert content["versions"]["lm-eval"]
    main_rows = [row for row in content["tasks"] if row["is_main"]]
    assert [row["metric"] for row in main_rows] == ["bits_per_byte", "acc_norm"]
    for row in content["tasks"]:
        assert row["num_documents"] == 3
        assert row["task"] in first.out
    bits = main_rows[0]
    assert bits["recovery"] == pytest.approx(bits["base"] / bits["compressed"])

    assert evaluate(models, "--output", str(tmp_path)) == 0
    again = capsys.readouterr()
    assert "base: kept scores of nbl_stdlib_perplexity, nbl_stdlib_next_line" in (
        again.err
    )
    assert (
        json.loads((tmp_path / "nbl_evaluation.json").read_text())["tasks"]
        == (content["tasks"])
    )

    assert evaluate(models, "--output", str(tmp_path), "--no-cache") == 0
    assert "kept scores" not in capsys.readouterr().err


def test_kept_scores_of_other_documents_are_not_used(
    models: tuple[Path, Path],
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(models, "--output", str(tmp_path)) == 0
    for path in (cache / "evaluation").iterdir():
        text = path.read_text()
        content = json.loads(text)
        for scores in content["scores"].values():
            scores["documents_hash"] = "of another standard library"
        path.write_text(json.dumps(content))
    capsys.readouterr()
    assert evaluate(models, "--output", str(tmp_path)) == 0
    assert "kept scores" not in capsys.readouterr().err


def test_results_are_beside_the_checkpoint_by_default(
    models: tuple[Path, Path],
) -> None:
    assert evaluate(models) == 0
    assert (models[1] / "nbl_evaluation.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "{models}/missing"], "missing: no such directory"),
        (["--tasks", "nbl_stdlib_recal"], "task nbl_stdlib_recal: lm-eval has none"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere: cannot write"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    folder = str(models[0].parent)
    options = [option.replace("{models}", folder) for option in options]
    assert evaluate(models, *options) == 2
    assert message in capsys.readouterr().err


def test_checkpoint_without_a_report_names_no_base_model(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(models[1]), *SMALL]) == 2
    said = capsys.readouterr().err
    assert "has no nbl_report.json that names its base model. Pass --baseline" in said


def test_backend_vllm_says_where_to_run_it(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(models, "--backend", "vllm") == 2
    assert "vLLM is not installed here" in capsys.readouterr().err
