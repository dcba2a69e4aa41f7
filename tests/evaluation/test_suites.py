# SPDX-License-Identifier: Apache-2.0
"""Named sets of tasks, against the files of lm-eval and ours."""

import pytest
import yaml
from lm_eval.tasks import TaskManager

from nbl_modifier.evaluation import SUITES, Task
from nbl_modifier.evaluation.harness import TASK_FOLDER
from nbl_modifier.evaluation.suites import tasks_of


def test_paper_suite_has_the_papers_shots() -> None:
    shots = {task.name: task.num_fewshot for task in SUITES["paper"]}
    assert shots.pop("mmlu") == 5
    assert len(shots) == 7
    assert set(shots.values()) == {0}


def test_paper_tasks_are_lm_evals_with_those_metrics() -> None:
    index = TaskManager().task_index
    for task in SUITES["paper"]:
        config = index[task.name].cfg
        metrics = config.get("metric_list") or config["aggregate_metric_list"]
        names = [each["metric"] for each in metrics]
        assert task.metric in names, task.name
        # normalized accuracy wherever there is one
        assert task.metric == ("acc_norm" if "acc_norm" in names else "acc")


def test_offline_suite_is_what_the_folder_holds() -> None:
    found = {
        path.stem: path.read_text(encoding="utf-8")
        for path in TASK_FOLDER.glob("*.yaml")
    }
    assert {task.name for task in SUITES["offline"]} == found.keys()
    for task in SUITES["offline"]:
        text = found[task.name].replace("!function ", "")
        config = yaml.safe_load(text)
        assert config["task"] == task.name
        assert config["dataset_kwargs"]["count"] >= 500
        assert task.metric in [each["metric"] for each in config["metric_list"]]


def test_tasks_by_suite_by_name_and_as_they_are() -> None:
    assert tasks_of("paper") == SUITES["paper"]
    own = Task("gsm8k", num_fewshot=8)
    assert tasks_of([own, "nbl_stdlib_recall", "lambada_openai"]) == (
        own,
        Task("nbl_stdlib_recall", "acc"),
        Task("lambada_openai"),
    )


def test_no_task_and_no_such_suite_are_errors() -> None:
    with pytest.raises(ValueError, match="suite papers: not known, there are offline"):
        tasks_of("papers")
    with pytest.raises(ValueError, match="no task to evaluate"):
        tasks_of([])
