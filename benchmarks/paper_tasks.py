# SPDX-License-Identifier: Apache-2.0
"""
The paper's eight tasks from JSON lines, as lm-eval task files, without a network.

A folder holds ``arc_easy.jsonl``, ``arc_challenge.jsonl``, ``boolq.jsonl``,
``hellaswag.jsonl``, ``openbookqa.jsonl``, ``piqa.jsonl``, ``winogrande.jsonl`` and
``mmlu.jsonl`` with the fields that the data sets have on the hub (HellaSwag's prepared:
``query``, ``choices``, ``gold``), and ``mmlu_dev.jsonl`` with examples of MMLU's
subjects for its prompts. Prompts have the form that lm-eval's tasks of the same names
give them.

Documents come in a random order that never changes, so that the first N are a sample of
all: MMLU's file is sorted by subject, and Winogrande's sentences come in pairs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nbl_modifier.evaluation import SUITES, Task

_EXAMPLES = "mmlu_dev"
_HELPERS = "paper_documents"
_BEFORE = "mmlu_before.json"
_ARC: dict[str, Any] = {
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
}
_FIELDS: dict[str, dict[str, Any]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "boolq": {
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "{{answer|int}}",
        "doc_to_choice": ["no", "yes"],
    },
    "hellaswag": {
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold|int}}",
        "doc_to_choice": "choices",
    },
    "openbookqa": _ARC | {"doc_to_text": "question_stem"},
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
    },
    # The ending is scored after each beginning; lm-eval wants the right one's number
    # where other tasks have their text.
    "winogrande": {
        "doc_to_text": f"!function {_HELPERS}.right_option",
        "doc_to_target": f"!function {_HELPERS}.ending",
        "doc_to_choice": f"!function {_HELPERS}.beginnings",
    },
    # lm-eval's samplers do not know the document that the examples are for, so these
    # are part of it; "before" is a field of each.
    "mmlu": {
        "description": "before",
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
        "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": ["A", "B", "C", "D"],
        "process_docs": f"!function {_HELPERS}.after_examples",
    },
}
# The functions that the task files name, in a file beside them.
_HELPER_SOURCE = '''\
"""Functions of the task files beside this one; written by benchmarks/paper_tasks.py."""

import json
from pathlib import Path


def in_fixed_random_order(docs):
    return docs.shuffle(seed=0)


def after_examples(docs):
    file = Path(__file__).with_name("mmlu_before.json")
    before = json.loads(file.read_text(encoding="utf-8"))
    return in_fixed_random_order(docs).map(
        lambda doc: {"before": before[doc["subject"]]}
    )


def right_option(doc):
    return int(doc["answer"]) - 1


def beginnings(doc):
    before = doc["sentence"].partition("_")[0]
    return [before + doc["option1"], before + doc["option2"]]


def ending(doc):
    return doc["sentence"].partition("_")[2].strip()
'''


def paper_tasks(
    data: Path | None, folder: Path, mmlu_shots: int | None = None
) -> dict[str, Task]:
    """
    Return the suite's tasks by their names on the hub, from there or from files.

    From files, MMLU's examples are part of its documents, of each the first ones of its
    subject; to lm-eval it is a task without examples.

    :param data: folder of JSON lines, or None for lm-eval's own tasks
    :param folder: where task files for ``data`` are written
    :param mmlu_shots: examples in MMLU's prompts; None for the suite's number
    :raises FileNotFoundError: if a file of ``data`` is not there
    :raises ValueError: if a subject has fewer examples
    """
    tasks = {task.name: task for task in SUITES["paper"]}
    if mmlu_shots is not None:
        tasks["mmlu"] = replace(tasks["mmlu"], num_fewshot=mmlu_shots)
    if data is None:
        return tasks
    shots = tasks["mmlu"].num_fewshot or 0
    names = [*tasks, *([_EXAMPLES] if shots else [])]
    files = {name: data.expanduser().resolve() / f"{name}.jsonl" for name in names}
    absent = [file.name for file in files.values() if not file.is_file()]
    if absent:
        raise FileNotFoundError(
            f"--data {data}: lacks {', '.join(absent)}. Each task needs its file."
        )
    before = _before_questions(files["mmlu"], files.get(_EXAMPLES), shots)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _BEFORE).write_text(json.dumps(before), encoding="utf-8")
    (folder / f"{_HELPERS}.py").write_text(_HELPER_SOURCE, encoding="utf-8")
    return {
        name: replace(task, name=str(_write(task, files[name], folder)), num_fewshot=0)
        for name, task in tasks.items()
    }


def _before_questions(
    questions: Path, examples: Path | None, shots: int
) -> dict[str, str]:
    """Return, by subject, what stands in MMLU's prompts before the question."""
    pools: dict[str, list[dict[str, Any]]] = {}
    for doc in _lines(questions):
        pools.setdefault(doc["subject"], [])
    for doc in _lines(examples) if examples is not None else []:
        pools.setdefault(doc["subject"], []).append(doc)
    before = {}
    for subject, pool in pools.items():
        if len(pool) < shots:
            raise ValueError(
                f"{examples}: has {len(pool)} examples of {subject}, --mmlu-shots asks "
                f"for {shots}. Ask for fewer."
            )
        title = subject.replace("_", " ")
        before[subject] = "\n\n".join(
            [
                f"Multiple choice questions about {title}, with answers.",
                *map(_answered, pool[:shots]),
                "",
            ]
        )
    return before


def _answered(doc: dict[str, Any]) -> str:
    options = zip("ABCD", doc["choices"], strict=True)
    listed = "\n".join(f"{letter}. {text}" for letter, text in options)
    answer = "ABCD"[int(doc["answer"])]
    return f"{doc['question'].strip()}\n{listed}\nAnswer: {answer}"


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _write(task: Task, documents: Path, folder: Path) -> Path:
    """Write one task file and return its path."""
    metrics = dict.fromkeys(("acc", task.metric or "acc"))
    content = {
        "task": f"paper_{task.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(documents)}},
        "validation_split": "validation",
        "process_docs": f"!function {_HELPERS}.in_fixed_random_order",
        "output_type": "multiple_choice",
        **_FIELDS[task.name],
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{task.name}.yaml"
    path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False))
    return path


class _Dumper(yaml.SafeDumper):
    """Writes ``!function module.name`` as the tag that lm-eval reads."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    tag, separator, name = value.partition(" ")
    if separator and tag == "!function":
        return dumper.represent_scalar(tag, name)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value)


_Dumper.add_representer(str, _text)
