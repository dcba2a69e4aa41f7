# SPDX-License-Identifier: Apache-2.0
"""``nbl evaluate``: what a checkpoint keeps of its base model's scores, by lm-eval."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import path, positive, refuse_idle

if TYPE_CHECKING:
    from nbl_modifier.evaluation import Comparison, Task, TaskScores
    from nbl_modifier.evaluation.cache import ScoreCache
    from nbl_modifier.evaluation.harness import LoadedTask
    from nbl_modifier.records.evaluation import EvaluationReport

_DESCRIPTION = """\
Evaluate a checkpoint and its base model on the same lm-eval tasks with the same
backend. Prints both scores and what the checkpoint keeps, and writes them as JSON. The
base model's scores are kept and reused. Needs pip install "nbl-modifier[eval]".
"""
_EPILOG = """\
suites (docs/evaluation.md describes them):
  offline   three tasks made from the Python standard library; needs no network
  paper     the eight tasks of the NBL paper, MMLU with 5 shots, the others with none

examples:
  nbl evaluate Llama-3.1-8B-NBL --baseline meta-llama/Llama-3.1-8B --suite paper
  nbl evaluate Llama-3.1-8B-NBL --baseline meta-llama/Llama-3.1-8B --backend vllm \\
      --tasks gsm8k,wikitext          (where vLLM is)
"""


def add_parser(commands: Any) -> None:
    """
    Add the command to the parser's subcommands.

    :param commands: what ``ArgumentParser.add_subparsers`` returned
    """
    parser = commands.add_parser(
        "evaluate",
        help="measure what a checkpoint keeps of its base model's scores",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "checkpoint",
        type=path,
        metavar="CHECKPOINT",
        help="directory or Hugging Face name",
    )
    add(
        "--baseline",
        type=path,
        metavar="MODEL",
        help="base model (default: the one named in the checkpoint's nbl_report.json)",
    )
    _add_task_arguments(parser)
    _add_backend_arguments(parser)
    add(
        "--output",
        type=path,
        metavar="DIR",
        help="folder for nbl_evaluation.json (default: the checkpoint's)",
    )
    add(
        "--cache",
        type=path,
        metavar="DIR",
        help="folder for base models' scores (default: $NBL_CACHE/evaluation, or "
        "nbl_modifier/evaluation in the user's cache)",
    )
    add("--no-cache", action="store_true", help="evaluate the base model again")


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--suite",
        choices=["offline", "paper"],
        default="offline",
        help="a set of tasks (default: offline)",
    )
    what.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME,NAME",
        help="lm-eval tasks instead, each with its own number of shots",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="first N documents of each task"
    )


def _add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--backend",
        choices=["hf", "vllm"],
        default="hf",
        help="transformers (default), or vLLM where that is installed",
    )
    add(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="requests per forward pass, hf only (default: 8)",
    )
    add(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="context length, vllm only (default: the model's)",
    )


def run(args: argparse.Namespace) -> None:
    """
    Run the command.

    :param args: parsed by the parser of ``add_parser``
    :raises ValueError: on bad input; the message says which and what to do
    :raises ImportError: if lm-eval, or vLLM where asked for, is not installed
    """
    if args.backend == "vllm":
        refuse_idle(args, ["batch_size"], "with --backend vllm, which batches itself")
    else:
        refuse_idle(args, ["max_model_len"], "with --backend hf, it is of vllm")
    if args.no_cache:
        refuse_idle(args, ["cache"], "with --no-cache")

    from nbl_modifier.evaluation import compare, load_tasks
    from nbl_modifier.records.evaluation import EVALUATION_FILE_NAME
    from nbl_modifier.report.scores_table import SCORES_NOTE, scores_table

    from .checks import check_model

    start = time.perf_counter()
    baseline = args.baseline or _baseline_of(args.checkpoint)
    configs = {m: check_model(m, linearize=False) for m in (baseline, args.checkpoint)}
    output = _output_folder(args)
    if args.backend == "vllm":
        from .checks import require_vllm

        require_vllm()
    tasks = load_tasks(args.tasks or args.suite)
    print(f"{args.checkpoint}: {_titles(tasks)}", file=sys.stderr)
    compressed = _evaluate(args.checkpoint, tasks, args)
    cache = _cache(baseline, getattr(configs[baseline], "_commit_hash", None), args)
    base = _base_scores(baseline, tasks, compressed, cache, args)
    report = _report(baseline, compare(base, compressed), args)
    print(f"\n{args.checkpoint}, compared with {baseline}, backend {args.backend}\n")
    print(scores_table(report.tasks, report.average).to_text())
    print(f"\n{SCORES_NOTE}")
    output.mkdir(parents=True, exist_ok=True)
    path = output / EVALUATION_FILE_NAME
    report.save(path)
    print(f"\nresults: {path}, {time.perf_counter() - start:,.0f} s")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names no task")
    return names


def _baseline_of(checkpoint: str) -> str:
    """Return the model that the first NBL run on the checkpoint started from."""
    from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport

    path = Path(checkpoint) / REPORT_FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"{checkpoint}: has no {REPORT_FILE_NAME} that names its base model. Pass "
            "--baseline."
        )
    report = NBLReport.load(path)
    while report.previous is not None:
        report = report.previous
    if report.model.startswith((".", "/", "~")) and not Path(report.model).exists():
        raise ValueError(
            f"{path}: names the base model {report.model}, which is not there. Pass "
            "--baseline."
        )
    return report.model


def _output_folder(args: argparse.Namespace) -> Path:
    from .checks import check_writable

    named = args.output or args.checkpoint
    if not args.output and not Path(named).is_dir():
        raise ValueError(
            f"{args.checkpoint}: is no directory, so there is no place for the "
            "results. Pass --output."
        )
    check_writable(Path(named))
    return Path(named)


def _titles(tasks: list[LoadedTask]) -> str:
    return ", ".join(task.task.name for task in tasks)


def _evaluate(
    model: str, tasks: list[LoadedTask], args: argparse.Namespace
) -> dict[str, TaskScores]:
    """Load the model with the backend asked for and return its scores."""
    if args.backend == "vllm":
        return _evaluate_in_vllm(model, [task.task for task in tasks], args)
    from nbl_modifier.evaluation import evaluate_model

    from .sources import load_model, load_tokenizer

    return evaluate_model(
        load_model(model),
        load_tokenizer(model),
        tasks,
        limit=args.limit,
        batch_size=args.batch_size,
    )


def _evaluate_in_vllm(
    model: str, tasks: list[Task], args: argparse.Namespace
) -> dict[str, TaskScores]:
    """Run one engine in a process of its own, so that it gives all memory back."""
    from nbl_modifier.worker import answer_of

    from . import evaluate_worker

    job = {
        "model": model,
        "tasks": tasks,
        "limit": args.limit,
        "max_model_len": args.max_model_len,
    }
    scores: dict[str, TaskScores] = answer_of(
        evaluate_worker.main,
        job,
        subject=f"model {model}: vLLM",
        show_output=args.debug,
        show_errors=True,  # progress bars
    )
    return scores


def _cache(
    baseline: str, commit: str | None, args: argparse.Namespace
) -> ScoreCache | None:
    from nbl_modifier.benchmark.machine import current_device
    from nbl_modifier.evaluation.cache import ScoreCache, default_folder, fingerprint
    from nbl_modifier.records.provenance import collect_versions

    if args.no_cache:
        return None
    local = Path(baseline).is_dir()
    if not local and commit is None:
        return None
    settings = {
        "model": fingerprint(baseline) if local else f"{baseline}@{commit}",
        "backend": args.backend,
        "device": current_device(),
        "batch_size": args.batch_size,
        "limit": args.limit,
        "max_model_len": args.max_model_len,
        "versions": collect_versions(),
    }
    folder = Path(args.cache).expanduser() if args.cache else default_folder()
    return ScoreCache(folder, settings)


def _base_scores(
    baseline: str,
    tasks: list[LoadedTask],
    compressed: Mapping[str, TaskScores],
    cache: ScoreCache | None,
    args: argparse.Namespace,
) -> dict[str, TaskScores]:
    """Return the base model's scores, those that were kept as long as they fit."""
    kept: dict[str, dict[str, TaskScores]] = {}
    for task in tasks if cache is not None else []:
        found = cache.load(task.task.name, task.task.num_fewshot) if cache else None
        # the same questions: the standard library, or a data set, may have changed
        if found is not None and all(
            name in compressed
            and each.documents_hash == compressed[name].documents_hash
            for name, each in found.items()
        ):
            kept[task.task.name] = found
    missing = [task for task in tasks if task.task.name not in kept]
    if kept:
        print(f"{baseline}: kept scores of {', '.join(kept)}", file=sys.stderr)
    if missing:
        print(f"{baseline}: {_titles(missing)}", file=sys.stderr)
        scores = _evaluate(baseline, missing, args)
        for task in missing:
            own = {name: scores[name] for name in task.names}
            kept[task.task.name] = own
            if cache is not None:
                cache.save(task.task.name, task.task.num_fewshot, own)
    return {name: each for task in tasks for name, each in kept[task.task.name].items()}


def _report(
    baseline: str, comparison: Comparison, args: argparse.Namespace
) -> EvaluationReport:
    from nbl_modifier.records.evaluation import EvaluationReport
    from nbl_modifier.records.provenance import collect_versions, utc_timestamp

    return EvaluationReport(
        format_version=EvaluationReport.VERSION,
        checkpoint=args.checkpoint,
        baseline=baseline,
        backend=args.backend,
        limit=args.limit,
        tasks=comparison.metric_results(),
        average=comparison.average_result(),
        versions=collect_versions(),
        created=utc_timestamp(),
    )
