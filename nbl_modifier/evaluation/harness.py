# SPDX-License-Identifier: Apache-2.0
"""lm-eval: its tasks, and what a model scores on them. Imported inside functions."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .perplexity import evaluation_mode
from .scores import Score, TaskScores, preferred_metric, ratio_score
from .suites import OFFLINE_PREFIX, Task, tasks_of

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK_FOLDER = Path(__file__).with_name("tasks")
# For metrics without a formula for their standard error, such as F1.
_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class LoadedTask:
    """
    A task with its documents in memory.

    :param task: what was asked for
    :param objects: lm-eval's: one task, a group, or the tasks of a tag
    :param names: what their results are listed under
    """

    task: Task
    objects: list[Any]
    names: tuple[str, ...]


def load_tasks(tasks: str | Sequence[str | Task]) -> list[LoadedTask]:
    """
    Load tasks and their documents, so that what can fail does before a model is loaded.

    :param tasks: ``offline``, ``paper``, or names of tasks
    :raises ValueError: if lm-eval knows no such task, or its data cannot be had
    :raises ImportError: if lm-eval is not installed
    """
    wanted = tasks_of(tasks)
    with _quiet():
        manager = _task_manager(
            include_defaults=not all(t.name.startswith(OFFLINE_PREFIX) for t in wanted)
        )
        return [_load(task, manager) for task in wanted]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str | Task] | Sequence[LoadedTask] = "offline",
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskScores]:
    """
    Return what a transformers model in memory scores.

    Documents begin with the tokenizer's BOS token, where it has one, whether or not it
    adds it by itself: models are trained so.

    :param model: causal language model, on the device to use
    :param tokenizer: the model's; left as it is
    :param tasks: ``offline``, ``paper``, names of tasks, or from ``load_tasks``
    :param limit: documents per task, the first ones; None for all
    :param batch_size: requests per forward pass
    :return: task to scores, in order
    :raises ValueError: if lm-eval knows no such task, or its data cannot be had
    :raises ImportError: if lm-eval is not installed
    """
    loaded = _loaded(tasks)
    from lm_eval.models.huggingface import HFLM

    from nbl_modifier.numerics.products import FastProducts

    with _quiet(), evaluation_mode(model), FastProducts():
        lm = HFLM(
            pretrained=model,
            tokenizer=with_bos(tokenizer),
            batch_size=batch_size,
            add_bos_token=adds_bos(tokenizer),
        )
        return run_tasks(lm, loaded, limit)


def run_tasks(
    lm: LM, tasks: Sequence[LoadedTask], limit: int | None = None
) -> dict[str, TaskScores]:
    """
    Return what lm-eval's model ``lm`` scores.

    :param lm: of any backend
    :param tasks: from ``load_tasks``
    :param limit: documents per task, the first ones; None for all
    :return: task to scores, in order
    """
    from lm_eval.evaluator import simple_evaluate

    scores: dict[str, TaskScores] = {}
    with _quiet():
        for shots, group in itertools.groupby(
            tasks, lambda task: task.task.num_fewshot
        ):
            batch = list(group)
            results = simple_evaluate(
                model=lm,
                tasks=[each for task in batch for each in task.objects],
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP_SAMPLES,
                # Given, or the index of all of lm-eval's tasks is read once more.
                task_manager=_task_manager(include_defaults=False),
            )
            assert results is not None, "one process, rank 0"
            for task in batch:
                for name in task.names:
                    scores[name] = _scores(name, task.task.metric, results)
    return scores


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    Return a copy of the tokenizer that adds its BOS token to texts.

    :param tokenizer: the model's
    """
    ours = copy.deepcopy(tokenizer)
    if adds_bos(tokenizer):
        ours.add_bos_token = True
    return ours


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """
    Return lm-eval's ``add_bos_token`` for a tokenizer: None if it has no BOS token.

    :param tokenizer: the model's
    """
    return True if tokenizer.bos_token_id is not None else None


def _loaded(
    tasks: str | Sequence[str | Task] | Sequence[LoadedTask],
) -> list[LoadedTask]:
    if not isinstance(tasks, str) and all(isinstance(t, LoadedTask) for t in tasks):
        return [task for task in tasks if isinstance(task, LoadedTask)]
    return load_tasks(tasks)  # type: ignore[arg-type]  # none is a LoadedTask


def _task_manager(*, include_defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as err:
        raise ImportError(
            'evaluation on tasks needs lm-eval: pip install "nbl-modifier[eval]", into '
            "the environment that this runs in."
        ) from err
    return TaskManager(include_path=TASK_FOLDER, include_defaults=include_defaults)


def _load(task: Task, manager: Any) -> LoadedTask:
    try:
        found = manager.load([task.name])
    except KeyError as err:
        close = difflib.get_close_matches(task.name, manager.all_tasks, n=5)
        hint = f" Similar: {', '.join(close)}." if close else ""
        raise ValueError(
            f"task {task.name}: lm-eval has none of that name.{hint} Check the name, "
            "or pass the path of a task's YAML file."
        ) from err
    except OSError as err:  # what datasets raises without a network
        raise ValueError(
            f"task {task.name}: its data cannot be loaded ({err}). It comes from the "
            "Hugging Face hub: check the network and HF_HUB_OFFLINE, or use --suite "
            "offline, which needs none."
        ) from err
    groups = found["groups"]
    # The group asked for comes first, then those inside it.
    objects = [next(iter(groups.values()))] if groups else list(found["tasks"].values())
    names = [next(iter(groups))] if groups else list(found["tasks"])
    return LoadedTask(task, objects, tuple(names))


def _scores(name: str, metric: str | None, results: Any) -> TaskScores:
    """
    Return one task's part of lm-eval's results.

    :param name: task, or group with a score of its own
    :param metric: the metric to compare models by, None for the preferred one
    :param results: from ``lm_eval.evaluator.simple_evaluate``
    """
    samples = [
        sample for leaf in _leaves(name, results) for sample in results["samples"][leaf]
    ]
    entry = results["results"][name]
    scores = {}
    for key, value in entry.items():
        measure, comma, selected = key.partition(",")
        if not comma or measure.endswith("_stderr") or isinstance(value, str):
            continue
        higher = results["higher_is_better"].get(name, {}).get(measure) is not False
        stderr = entry.get(f"{measure}_stderr,{selected}")
        short = measure if selected == "none" else key
        scores[short] = _score(
            measure,
            [sample.get(measure) for sample in samples if sample["filter"] == selected],
            Score(value, stderr if isinstance(stderr, float) else None, higher),
        )
    if not scores:
        raise ValueError(
            f"task {name}: a group without a score of its own. Pass its tasks: "
            f"{', '.join(_leaves(name, results))}."
        )
    if metric is not None and metric not in scores:
        raise ValueError(
            f"task {name}: has no metric {metric}, it has {', '.join(scores)}."
        )
    return TaskScores(
        task=name,
        metric=metric or preferred_metric(list(scores)),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        num_documents=len({(s["doc_hash"], s["doc_id"]) for s in samples}),
        documents_hash=_documents_hash(samples),
        scores=scores,
    )


def _leaves(name: str, results: Any) -> list[str]:
    children = results.get("group_subtasks", {}).get(name)
    if children is None:
        return [name]
    return [leaf for child in children for leaf in _leaves(child, results)]


def _score(metric: str, values: list[Any], reported: Score) -> Score:
    """
    Return the score with each document's influence, if it is what lm-eval makes of it.

    :param metric: name without a filter
    :param values: of the documents: numbers, or pairs of numerator and denominator
    :param reported: lm-eval's value and standard error
    """
    if values and all(isinstance(value, tuple | list) for value in values):
        pairs = [tuple(value) for value in values]
    else:
        pairs = [(value, 1.0) for value in values]
    if any(
        len(pair) != 2 or not all(isinstance(part, int | float) for part in pair)
        for pair in pairs
    ):
        return reported
    numerators, denominators = zip(*pairs, strict=True)
    score = ratio_score(numerators, denominators, metric, reported.higher_is_better)
    # Both are float64 sums over the same documents. F1 and its like differ, and so does
    # a group that weights its tasks equally.
    return (
        score if math.isclose(score.value, reported.value, rel_tol=1e-9) else reported
    )


def _documents_hash(samples: list[Any]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for part in ("doc_hash", "prompt_hash", "target_hash"):
            digest.update(sample[part].encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's remarks on arguments to itself, unless someone set its level."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    if before == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
