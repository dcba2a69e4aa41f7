# SPDX-License-Identifier: Apache-2.0
"""The offline tasks' documents are what docs/evaluation.md says they are."""

import hashlib
import json
import os
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nbl_modifier.evaluation import documents
from nbl_modifier.evaluation.texts import stdlib_texts

MODEL = Path(__file__).parents[2] / "examples" / "models" / "pycode-4m"
COUNT = 600
KINDS = ["perplexity", "next_line", "recall"]
CHOICE_KINDS = KINDS[1:]


def rows(kind: str, count: int = COUNT) -> list[dict[str, Any]]:
    """Return the documents of one kind."""
    make = getattr(documents, f"{kind}_documents")
    return list(make(count, version=1.0)[documents.SPLIT])


@pytest.fixture(scope="module")
def made() -> dict[str, list[dict[str, Any]]]:
    """Return the documents of every kind."""
    return {kind: rows(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def modules() -> list[str]:
    """Return the held-out modules' source."""
    return stdlib_texts("heldout")


def test_documents_do_not_depend_on_hash_or_process(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    code = (
        "import hashlib, json\n"
        "from nbl_modifier.evaluation import documents as d\n"
        f"for kind in {KINDS}:\n"
        f"    rows = list(getattr(d, f'{{kind}}_documents')({COUNT})['test'])\n"
        "    text = json.dumps(rows, sort_keys=True).encode()\n"
        "    print(hashlib.sha256(text).hexdigest())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    ours = [
        hashlib.sha256(json.dumps(made[kind], sort_keys=True).encode()).hexdigest()
        for kind in KINDS
    ]
    assert result.stdout.split() == ours


def test_no_document_twice(made: dict[str, list[dict[str, Any]]]) -> None:
    for kind, found in made.items():
        texts = Counter(json.dumps(row) for row in found)
        assert len(texts) == COUNT, kind


def test_pieces_stand_in_held_out_modules(
    made: dict[str, list[dict[str, Any]]], modules: list[str]
) -> None:
    for row in made["perplexity"]:
        assert 350 <= len(row["text"]) <= 700
        assert any(row["text"] in module for module in modules)


@pytest.mark.parametrize("kind", CHOICE_KINDS)
def test_right_answer_is_what_follows(
    made: dict[str, list[dict[str, Any]]], modules: list[str], kind: str
) -> None:
    for row in made[kind]:
        text = row["context"] + row["choices"][row["answer"]]
        assert any(text in module for module in modules)


@pytest.mark.parametrize("kind", CHOICE_KINDS)
def test_four_different_answers_in_random_order(
    made: dict[str, list[dict[str, Any]]], kind: str
) -> None:
    assert all(len(set(row["choices"])) == 4 for row in made[kind])
    places = Counter(row["answer"] for row in made[kind])
    # 150 of each expected; 40 are four standard deviations of a fair draw
    assert all(abs(places[place] - COUNT / 4) < 40 for place in range(4))


@pytest.mark.parametrize("kind", CHOICE_KINDS)
def test_length_does_not_give_the_answer_away(
    made: dict[str, list[dict[str, Any]]], kind: str
) -> None:
    """Who takes the shortest or the longest answer is right about as often as not."""
    for pick in (min, max):
        right = sum(
            row["choices"].index(pick(row["choices"], key=len)) == row["answer"]
            for row in made[kind]
        )
        # a quarter expected of a fair draw, and six standard deviations more
        assert right / COUNT < 0.25 + 6 * (0.25 * 0.75 / COUNT) ** 0.5, pick.__name__


def test_next_lines_are_indented_alike_and_wrong_ones_are_new(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    for row in made["next_line"]:
        indents = {len(line) - len(line.lstrip()) for line in row["choices"]}
        assert len(indents) == 1
        for place, line in enumerate(row["choices"]):
            if place != row["answer"]:
                assert line.strip() not in row["context"]


def test_recalled_name_is_far_back_and_wrong_ones_are_new(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    for row in made["recall"]:
        heads, names = zip(*(split_name(each) for each in row["choices"]), strict=True)
        assert len(set(heads)) == 1
        before = row["context"] + heads[0]
        for place, name in enumerate(names):
            if place == row["answer"]:
                assert name in before[:-300]
                assert name not in before[-300:]
            else:
                assert name not in before


def split_name(answer: str) -> tuple[str, str]:
    """Return what stands before the name at the end of an answer, and the name."""
    head = answer.rstrip("_" + string.ascii_letters + string.digits)
    return head, answer[len(head) :]


def test_documents_fit_the_context_of_the_bundled_model(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for kind, found in made.items():
        texts = [
            row["text"] if "text" in row else row["context"] + max(row["choices"])
            for row in found
        ]
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        # Nine in ten, in the source of Python 3.11.7, less four standard deviations of
        # a draw: each Python has its own. Tables of numbers take a token per digit;
        # what is longer still has a score.
        share = 0.9 - 4 * (0.9 * 0.1 / COUNT) ** 0.5
        assert sum(length <= 256 for length in lengths) / COUNT > share, kind


def test_more_documents_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="100000 were asked for"):
        documents.perplexity_documents(100_000)
