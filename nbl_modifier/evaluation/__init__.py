# SPDX-License-Identifier: Apache-2.0
"""Perplexity on token windows, lm-eval tasks, and what of them a checkpoint keeps."""

from .comparison import Comparison, compare
from .harness import evaluate_model, load_tasks
from .perplexity import PerplexityResult, perplexity
from .scores import Score, TaskScores
from .suites import SUITES, Task

__all__ = [
    "SUITES",
    "Comparison",
    "PerplexityResult",
    "Score",
    "Task",
    "TaskScores",
    "compare",
    "evaluate_model",
    "load_tasks",
    "perplexity",
]
