# SPDX-License-Identifier: Apache-2.0
"""``nbl benchmark``: speed of a compressed model beside its base model's."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .options import fraction, path, positive, positive_number, refuse_idle, text

if TYPE_CHECKING:
    from nbl_modifier.benchmark.plan import Grid, Settings

_DESCRIPTION = """\
Measure how fast two models read prompts (prefill) and generate (decode), in vLLM or in
transformers, and how much their KV caches hold. Both run in turn, each in a process of
its own. Beside each measured ratio stands the one that bytes and floating-point
operations predict at this machine's peak speeds, and how much of it was attained.
"""
_EPILOG = """\
example:
  nbl benchmark Llama-3.1-8B-NBL --baseline meta-llama/Llama-3.1-8B \\
      --context 512,2048,8192 --batch 1,8,64 --output speed
  nbl benchmark Llama-3.1-8B-NBL --baseline meta-llama/Llama-3.1-8B --suite paper
"""
_CONTEXTS, _BATCHES = "512,2048,8192,32768", "1,8,64"
# arXiv:2505.21077, Section 4: 2048 tokens in, 2048 out, batch 1, transformers.
_PAPER: dict[str, Any] = {
    "engine": "transformers",
    "attention": "eager",
    "context": (2048,),
    "batch": (1,),
    "generate_tokens": 2048,
}


def add_parser(commands: Any) -> None:
    """
    Add the command to the parser's subcommands.

    :param commands: what ``ArgumentParser.add_subparsers`` returned
    """
    parser = commands.add_parser(
        "benchmark",
        help="speed and KV-cache capacity, measured and predicted",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "model",
        type=path,
        metavar="CHECKPOINT",
        help="the compressed model, a directory or name",
    )
    add(
        "--baseline",
        type=path,
        required=True,
        metavar="MODEL",
        help="the model before it",
    )
    add(
        "--output",
        type=path,
        metavar="DIR",
        help="write nbl_benchmark.json and a .md there",
    )
    _add_grid_arguments(parser.add_argument_group("what to measure"))
    _add_engine_arguments(parser.add_argument_group("how"))


def _add_grid_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--suite",
        choices=["paper"],
        help="paper: the paper's setting, 2048 tokens in and 2048 out, batch 1, "
        "transformers with eager attention; other options override it",
    )
    add(
        "--context",
        "--prompt-tokens",
        type=_numbers,
        metavar="LIST",
        help=f"prompt tokens per sequence (default: {_CONTEXTS})",
    )
    add(
        "--batch",
        type=_numbers,
        metavar="LIST",
        help=f"sequences at once (default: {_BATCHES})",
    )
    add(
        "--generate-tokens",
        type=positive,
        metavar="N",
        help="tokens to generate per sequence (default: 64)",
    )
    add(
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="rounds, each of both models (default: 3)",
    )
    add(
        "--max-seconds",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="leave out what would take longer in one round even at the machine's peak "
        "(default: 600)",
    )


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--engine",
        choices=["vllm", "transformers"],
        help="(default: vllm where it is installed)",
    )
    add(
        "--dtype",
        type=text,
        default="auto",
        help="for both models (default: the checkpoint's)",
    )
    add(
        "--attention",
        choices=["sdpa", "eager"],
        help="implementation in transformers (default: sdpa)",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="vLLM without compilation and CUDA graphs (default: on a CPU only)",
    )
    add(
        "--random-weights",
        action="store_true",
        help="make weights up; the models need only a config.json",
    )
    add(
        "--one-at-a-time",
        action=argparse.BooleanOptionalAction,
        help="load each model anew in each round (default: if both do not fit in "
        "memory)",
    )
    add(
        "--kv-cache-gib",
        type=positive,
        metavar="N",
        help="vLLM's KV cache on a CPU (default: VLLM_CPU_KVCACHE_SPACE, or 1)",
    )
    add(
        "--gpu-memory",
        type=fraction,
        default=0.9,
        metavar="F",
        help="part of an accelerator's memory that vLLM uses, both models together "
        "(default: 0.9)",
    )
    add(
        "--engine-args",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 2}'",
    )


def run(args: argparse.Namespace) -> None:
    """
    Run the command.

    :param args: parsed by the parser of ``add_parser``
    :raises ValueError: on bad input, before anything is loaded
    :raises ImportError: if the engine is not installed
    :raises RuntimeError: if an engine dies
    """
    from nbl_modifier.benchmark import runner
    from nbl_modifier.benchmark.shapes import load_model
    from nbl_modifier.records.files import write_atomically
    from nbl_modifier.records.speed import SPEED_FILE_NAME
    from nbl_modifier.report.escaping import fenced
    from nbl_modifier.report.speed_table import speed_summary, speed_table

    from .checks import make_folder

    grid, settings = _plan(args)
    folder = None if args.output is None else make_folder(args.output)
    base, compressed = (
        load_model(name, args.dtype, random_weights=args.random_weights)
        for name in (args.baseline, args.model)
    )
    if base.dtype != compressed.dtype:
        raise ValueError(
            f"{base.name} runs in {base.dtype}, {compressed.name} in "
            f"{compressed.dtype}: their speeds do not compare. Pass --dtype."
        )
    report = runner.run(base, compressed, grid, settings, _progress)
    print(speed_summary(report), end="\n\n")
    print(speed_table(report).to_text())
    for cell in report.skipped:
        print(f"not run: context {cell.context:,}, batch {cell.batch}: {cell.reason}")
    if folder is not None:
        report.save(folder / SPEED_FILE_NAME)
        table = speed_table(report, with_skipped=True).to_markdown()
        text = f"{fenced(speed_summary(report))}\n\n{table}\n"
        write_atomically((folder / SPEED_FILE_NAME).with_suffix(".md"), text)
        print(f"\nwritten: {folder / SPEED_FILE_NAME}")


def _plan(args: argparse.Namespace) -> tuple[Grid, Settings]:
    """Return what the command line asks for, defaults filled in."""
    from nbl_modifier.benchmark.plan import Grid, Settings

    suite: dict[str, Any] = _PAPER if args.suite == "paper" else {}

    def value(name: str, default: Any) -> Any:
        given = getattr(args, name)
        return suite.get(name, default) if given is None else given

    default_engine = "vllm" if find_spec("vllm") is not None else "transformers"
    engine = value("engine", default_engine)
    if find_spec(engine) is None:
        raise ImportError(
            f"--engine {engine}: is not installed here. Run this in the environment "
            "that serves: pip install vllm nbl-modifier."
        )
    grid = Grid(
        contexts=value("context", _numbers(_CONTEXTS)),
        batches=value("batch", _numbers(_BATCHES)),
        generate=value("generate_tokens", 64),
        rounds=args.repeats,
        max_seconds=args.max_seconds,
    )
    import torch

    accelerated = torch.accelerator.is_available()
    _refuse_idle(args, engine, accelerated)
    settings = Settings(
        engine=engine,
        attention=value("attention", "sdpa"),
        random_weights=args.random_weights,
        eager=not accelerated if args.enforce_eager is None else args.enforce_eager,
        kv_cache_gib=args.kv_cache_gib,
        memory_fraction=args.gpu_memory,
        engine_args=args.engine_args,
        together=None if args.one_at_a_time is None else not args.one_at_a_time,
        on_accelerator=accelerated,
        show_log=args.debug,
    )
    return grid, settings


def _refuse_idle(args: argparse.Namespace, engine: str, accelerated: bool) -> None:
    """Refuse options of the engine, or of the machine, that this run is not on."""
    if engine == "vllm":
        refuse_idle(args, ["attention"], "in vLLM, which chooses by itself")
    else:
        names = ("enforce_eager", "kv_cache_gib", "gpu_memory", "engine_args")
        refuse_idle(args, names, f"in {engine}, it is of --engine vllm")
    if accelerated:
        refuse_idle(args, ["kv_cache_gib"], "on an accelerator, see --gpu-memory")
    else:
        refuse_idle(args, ["gpu_memory"], "on a CPU, see --kv-cache-gib")


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _numbers(text: str) -> tuple[int, ...]:
    values = tuple(positive(part) for part in text.split(","))
    return tuple(sorted(set(values)))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r}") from err
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value
