# SPDX-License-Identifier: Apache-2.0
"""Real lm-eval on the offline tasks: against our own sums, chance, and no attention."""

import copy
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nbl_modifier.evaluation import (
    Task,
    TaskScores,
    evaluate_model,
    load_tasks,
    perplexity,
)
from nbl_modifier.evaluation.documents import SPLIT, perplexity_documents
from nbl_modifier.evaluation.harness import TASK_FOLDER

MODEL = Path(__file__).parents[2] / "examples" / "models" / "pycode-4m"
CHANCE = 0.25
LIMIT = 150
CHOICES = ["nbl_stdlib_next_line", "nbl_stdlib_recall"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the bundled model's tokenizer, which adds no BOS token by itself."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> dict[str, TaskScores]:
    """Return what the bundled model scores."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    return evaluate_model(model, tokenizer, limit=LIMIT, batch_size=16)


@pytest.fixture(scope="module")
def random_model() -> Any:
    """Return a small random model with the bundled model's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("task", CHOICES)
def test_base_model_is_far_above_chance(base: dict[str, TaskScores], task: str) -> None:
    score = base[task].score
    assert score.stderr is not None
    assert score.value - 3 * score.stderr > CHANCE


def test_random_model_is_at_chance(random_model: Any, tokenizer: Any) -> None:
    scores = evaluate_model(random_model, tokenizer, CHOICES, limit=300, batch_size=32)
    for task in CHOICES:
        for score in scores[task].scores.values():
            # 300 fair draws of one in four: 2.5%, and 3.5 of those
            assert score.value == pytest.approx(CHANCE, abs=0.0875)


def test_recall_needs_attention(base: dict[str, TaskScores], tokenizer: Any) -> None:
    """Without any attention, the model that recalls most names recalls few."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    blind = evaluate_model(
        model, tokenizer, ["nbl_stdlib_recall"], limit=LIMIT, batch_size=16
    )["nbl_stdlib_recall"].score
    assert blind.value < 0.6 * base["nbl_stdlib_recall"].score.value


def test_bits_per_byte_are_those_of_our_own_perplexity(
    base: dict[str, TaskScores], tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    texts = perplexity_documents(600)[SPLIT]["text"][:LIMIT]
    windows = [[tokenizer.bos_token_id, *tokenizer(t)["input_ids"]] for t in texts]
    ours = perplexity(model, windows)
    num_bytes = sum(len(text.encode()) for text in texts)
    expected = ours.nll_mean * ours.num_tokens / num_bytes / math.log(2)
    # batches differ, and with them the order of bfloat16 sums
    found = base["nbl_stdlib_perplexity"].scores
    assert found["bits_per_byte"].value == pytest.approx(expected, rel=1e-3)
    assert found["byte_perplexity"].value == pytest.approx(2**expected, rel=1e-3)


def test_every_score_has_its_error_and_documents(base: dict[str, TaskScores]) -> None:
    for scores in base.values():
        assert scores.num_documents == LIMIT
        assert scores.num_fewshot == 0
        for score in scores.scores.values():
            assert score.influence is not None
            assert len(score.influence) == LIMIT
            assert score.stderr is not None
            assert math.isfinite(score.stderr)


def test_model_tokenizer_and_log_levels_are_left_alone(
    random_model: Any, tokenizer: Any
) -> None:
    model, own = copy.deepcopy(random_model).train(), copy.deepcopy(tokenizer)
    evaluate_model(model, own, ["nbl_stdlib_recall"], limit=2)
    assert model.training
    assert own("import os")["input_ids"] == tokenizer("import os")["input_ids"]
    assert own.pad_token == tokenizer.pad_token
    assert logging.getLogger("lm_eval").level == logging.NOTSET


def test_loaded_tasks_ask_the_same_questions_again(
    random_model: Any, tokenizer: Any
) -> None:
    tasks = load_tasks(["nbl_stdlib_recall"])
    first, again = (
        evaluate_model(random_model, tokenizer, tasks, limit=4)["nbl_stdlib_recall"]
        for _ in range(2)
    )
    assert first == again
    other = evaluate_model(random_model, tokenizer, tasks, limit=5)["nbl_stdlib_recall"]
    assert other.documents_hash != first.documents_hash


def test_group_has_one_score_over_all_its_documents(
    random_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As MMLU is one: 57 tasks, weighted by size."""
    config = {
        "group": "nbl_pair",
        "task": CHOICES,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    # lm-eval finds groups by name only
    shutil.copytree(TASK_FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "nbl_pair.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("nbl_modifier.evaluation.harness.TASK_FOLDER", tmp_path)
    scores = evaluate_model(random_model, tokenizer, ["nbl_pair"], limit=6)
    parts = evaluate_model(random_model, tokenizer, CHOICES, limit=6)
    assert list(scores) == ["nbl_pair"]
    pair = scores["nbl_pair"]
    assert (pair.metric, pair.num_documents) == ("acc", 12)
    values = [parts[name].scores["acc"].value for name in CHOICES]
    assert pair.score.value == pytest.approx(sum(values) / 2, rel=1e-12)
    assert pair.score.influence is not None
    assert len(pair.score.influence) == 12


def test_shots_are_the_tasks_own_unless_given(
    random_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        f"include: {TASK_FOLDER / 'nbl_stdlib_recall.yaml'}",
        "task: nbl_shots",
        "fewshot_split: test",
        "num_fewshot: 1",
    ]
    (tmp_path / "nbl_shots.yaml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    own, given = (
        evaluate_model(
            random_model,
            tokenizer,
            [Task("nbl_shots.yaml", num_fewshot=shots)],
            limit=2,
        )["nbl_shots"]
        for shots in (None, 2)
    )
    assert (own.num_fewshot, given.num_fewshot) == (1, 2)
    assert own.documents_hash != given.documents_hash


def test_unknown_task_is_named_with_similar_ones() -> None:
    with pytest.raises(
        ValueError, match="task nbl_stdlib_recal: .*Similar: nbl_stdlib"
    ):
        load_tasks(["nbl_stdlib_recal"])


def test_unknown_metric_is_named(random_model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="has no metric f1, it has acc"):
        evaluate_model(
            random_model, tokenizer, [Task("nbl_stdlib_recall", "f1")], limit=2
        )


def test_data_from_the_hub_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="task boolq: its data cannot be loaded .*hub"):
        load_tasks(["boolq"])
