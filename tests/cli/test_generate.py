# SPDX-License-Identifier: Apache-2.0
"""``nbl generate`` around vLLM: what it prints, and what it says when vLLM fails."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier import worker
from nbl_modifier.cli import main, vllm_worker
from nbl_modifier.worker import Connection

TOKENS = {"base": 1000, "nbl": 1600}


def stand_in(job: dict[str, Any], connection: Connection) -> None:
    """Answer as the worker does, or fail as it does, without an engine."""
    if job["model"] == "broken":
        os.write(1, b"noise\n" * 100 + b"out of memory\n")
        os._exit(1)
    connection.send(
        {
            "architecture": "LlamaForCausalLM",
            "kv_cache_tokens": TOKENS[job["model"]],
            "completions": [f"one\n{prompt}" for prompt in job["prompts"]],
            "load_seconds": 1.0,
        }
    )


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answer as the worker does, per model; return the jobs it was given."""
    jobs: list[dict[str, Any]] = []
    original = worker.answer_of

    def answer_of(main: object, job: dict[str, Any], **options: Any) -> Any:
        assert main is vllm_worker.main
        jobs.append(job)
        return original(stand_in, job, **options)

    monkeypatch.setattr(worker, "answer_of", answer_of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return jobs


def test_prints_capacity_ratio_and_completions(
    fake_vllm: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "import os", "--prompt", "def"]
    assert main(["generate", "base", "nbl", *prompts]) == 0
    first, second, _ = capsys.readouterr().out.split("\n\n")
    assert "KV cache: 1,000 tokens\n" in first
    assert "times" not in first
    assert "KV cache: 1,600 tokens, 1.600 times the first model's" in second
    lines = "'import os' ->\n    one\n    import os\n  'def' ->\n    one\n    def"
    assert lines in second
    assert [job["model"] for job in fake_vllm] == ["base", "nbl"]


def test_options_reach_the_worker(fake_vllm: list[dict[str, Any]]) -> None:
    options = ["--max-tokens", "5", "--dtype", "float32", "--max-model-len", "128"]
    assert main(["generate", "base", "--prompt", "x", *options]) == 0
    expected = {"max_tokens": 5, "dtype": "float32", "max_model_len": 128}
    assert fake_vllm == [{"model": "base", "prompts": ["x"], **expected}]


def test_json_file_holds_the_same(
    fake_vllm: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    assert main(["generate", "base", "nbl", "--prompt", "x", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [row["kv_cache_tokens"] for row in results] == [1000, 1600]
    assert results[1]["model"] == "nbl"
    assert results[1]["completions"] == ["one\nx"]


def test_failure_shows_the_end_of_the_log_only(
    fake_vllm: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "broken", "base", "--prompt", "x"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nbl: error: model broken: vLLM failed with exit code 1")
    assert message.endswith("out of memory\n")
    assert message.count("noise") == 24
    assert len(fake_vllm) == 1


def test_missing_vllm_says_where_to_run_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    assert main(["generate", "some/model", "--prompt", "x"]) == 2
    assert "pip install vllm nbl-modifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "has no config.json"),
        (["base", "{folder}/missing"], "missing: no such directory"),
        (["base", "--json", "{folder}/no/x.json"], "--json {folder}/no/x.json: there"),
    ],
)
def test_bad_input_starts_no_engine(
    fake_vllm: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["generate", *arguments, "--prompt", "x"]) == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err
    assert fake_vllm == []
