"""
The rows of ``lm_eval/``: what a recipe must keep of the base model's scores.

Used by the test that holds the rows to their thresholds, and by the script that derives
the thresholds. Follows llm-compressor's own lm-eval tests: a YAML file for each case, a
``recovery_threshold`` for each metric, base scores kept, vLLM in its own environment.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from integration_tests.harness import serve_python, tail
from nbl_modifier.cli import main
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_name("lm_eval")
# In a row, what follows this line is written by derive_thresholds.py.
DERIVED = "# From integration_tests/derive_thresholds.py:"
TIMEOUT_SECONDS = 580


@dataclass(frozen=True)
class LmEval:
    """
    How a row is evaluated.

    :param model: lm-eval's name of the backend, ``hf`` or ``vllm``
    :param tasks: lm-eval's
    :param limit: documents per task
    :param recovery_threshold: task to metric to the least recovery
    """

    model: str
    tasks: list[str]
    limit: int
    recovery_threshold: dict[str, dict[str, float]]


@dataclass(frozen=True)
class LmEvalRow:
    """
    One case, a file in ``lm_eval/``.

    :param name: the file's name
    :param model: directory of the base model, in this repository
    :param recipe: llm-compressor recipe, or the path of one in this repository
    :param num_calibration_samples: sequences
    :param max_seq_length: tokens per sequence
    :param lmeval: how it is evaluated, and the thresholds
    """

    name: str
    model: str
    recipe: str | dict[str, Any]
    num_calibration_samples: int
    max_seq_length: int
    lmeval: LmEval

    @property
    def recipe_text(self) -> str:
        """The recipe as YAML."""
        if isinstance(self.recipe, str):
            return (ROOT / self.recipe).read_text(encoding="utf-8")
        return yaml.safe_dump(self.recipe)


def lm_eval_rows() -> list[LmEvalRow]:
    """Return all rows, by name."""
    rows = []
    for path in sorted(ROWS.glob("*.yaml")):
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        lmeval = LmEval(**{"recovery_threshold": {}} | fields.pop("lmeval"))
        rows.append(LmEvalRow(name=path.stem, lmeval=lmeval, **fields))
    return rows


def compress(row: LmEvalRow, directory: Path, seed: int) -> None:
    """
    Run a row's recipe on its model.

    :param directory: where the checkpoint goes
    :param seed: of the choice of calibration text
    """
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    import nbl_modifier.llmcompressor_plugin.modifier  # noqa: F401  # makes NBLModifier known to recipes

    tokenizer = AutoTokenizer.from_pretrained(ROOT / row.model)
    texts = stdlib_texts("calibration", seed)
    rows = pack(texts, tokenizer, row.max_seq_length, row.num_calibration_samples)
    torch.manual_seed(seed)
    oneshot(
        model=str(ROOT / row.model),
        dataset=rows,
        recipe=row.recipe_text,
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        batch_size=8,
        output_dir=str(directory),
    )


def evaluate(row: LmEvalRow, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """
    Return what ``nbl evaluate`` wrote about a checkpoint.

    :param checkpoint: compressed by the row's recipe
    :param folder: for logs and the base model's scores
    :raises RuntimeError: if the command fails; the message ends with its log
    """
    arguments = [
        *("evaluate", str(checkpoint), "--baseline", str(ROOT / row.model)),
        *("--backend", row.lmeval.model, "--tasks", ",".join(row.lmeval.tasks)),
        *("--limit", str(row.lmeval.limit)),
        *(("--batch-size", "16") if row.lmeval.model == "hf" else ()),
        *("--output", str(checkpoint), "--cache", str(folder)),
    ]
    if row.lmeval.model == "vllm":
        _evaluate_where_vllm_is(arguments, folder)
    elif main(arguments) != 0:
        raise RuntimeError(f"nbl {' '.join(arguments)} failed, see above")
    answer: dict[str, Any] = json.loads(
        (checkpoint / EVALUATION_FILE_NAME).read_text(encoding="utf-8")
    )
    return answer


def _evaluate_where_vllm_is(arguments: list[str], folder: Path) -> None:
    log = folder / "vllm.log"
    command = [serve_python(), "-m", "nbl_modifier.cli", *arguments]
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run(
            command,
            env={"VLLM_CACHE_ROOT": str(folder / "vllm")} | os.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail(log)}")


def recoveries(row: LmEvalRow, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """
    Return the recovery of each task's main metric, as rows hold their thresholds.

    :param results: from :func:`evaluate`
    """
    return {
        task: {
            entry["metric"]: entry["recovery"]
            for entry in results["tasks"]
            if entry["task"] == task and entry["is_main"]
        }
        for task in row.lmeval.tasks
    }


def shortfalls(row: LmEvalRow, results: dict[str, Any]) -> list[str]:
    """
    Return one line for each recovery below its threshold.

    :param results: from :func:`evaluate`
    """
    found = recoveries(row, results)
    return [
        f"{task} {metric}: recovery {found[task][metric]:.4f}, expected {least}"
        for task, metrics in row.lmeval.recovery_threshold.items()
        if task in found
        for metric, least in metrics.items()
        if not found[task][metric] >= least
    ]
