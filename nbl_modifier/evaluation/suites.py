# SPDX-License-Identifier: Apache-2.0
"""Sets of lm-eval tasks that have a name. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The task folder ``tasks/`` holds those whose names begin so; they need no network.
OFFLINE_PREFIX = "nbl_"


@dataclass(frozen=True)
class Task:
    """
    One lm-eval task as it is to be run.

    :param name: task or group of tasks in lm-eval, or a task's YAML file
    :param metric: the metric to compare models by; None for accuracy, normalized where
        the task has that
    :param num_fewshot: examples in the prompt; None for the task's own number
    """

    name: str
    metric: str | None = None
    num_fewshot: int | None = None


# The paper's reasoning tasks: NBL, arXiv:2505.21077, section 4, which names MMLU with 5
# shots and the others with none, as does the script released with it. Accuracy is
# normalized by length for tasks whose answers differ in it.
_PAPER = (
    Task("arc_easy", "acc_norm", 0),
    Task("arc_challenge", "acc_norm", 0),
    Task("boolq", "acc", 0),
    Task("hellaswag", "acc_norm", 0),
    Task("openbookqa", "acc_norm", 0),
    Task("piqa", "acc_norm", 0),
    Task("winogrande", "acc", 0),
    Task("mmlu", "acc", 5),
)
_OFFLINE = (
    Task("nbl_stdlib_perplexity", "bits_per_byte", 0),
    Task("nbl_stdlib_next_line", "acc_norm", 0),
    Task("nbl_stdlib_recall", "acc", 0),
)
SUITES = {"offline": _OFFLINE, "paper": _PAPER}


def tasks_of(tasks: str | Sequence[str | Task]) -> tuple[Task, ...]:
    """
    Return tasks by the name of their suite, or by their own names.

    :param tasks: ``offline``, ``paper``, or tasks
    :raises ValueError: if there is no such suite, or no task
    """
    if isinstance(tasks, str):
        if tasks not in SUITES:
            raise ValueError(
                f"suite {tasks}: not known, there are {', '.join(SUITES)}. Pass one of "
                "them, or a list of tasks."
            )
        return SUITES[tasks]
    if not tasks:
        raise ValueError("no task to evaluate. Pass at least one.")
    known = {task.name: task for suite in SUITES.values() for task in suite}
    return tuple(
        task
        if isinstance(task, Task)
        else Task(task, known[task].metric if task in known else None)
        for task in tasks
    )
