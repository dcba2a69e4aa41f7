# SPDX-License-Identifier: Apache-2.0
"""``nbl generate``: complete prompts in vLLM and compare KV-cache capacities."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checks import require_vllm
from .options import path, positive, text

_DESCRIPTION = """\
Load each model in vLLM, one after the other, each in a process of its own. Prints how
many tokens its KV cache holds and a greedy completion of each prompt. Runs where vLLM
is installed.
"""
_EPILOG = """\
example:
  nbl generate meta-llama/Llama-3.1-8B Llama-3.1-8B-NBL --prompt "The KV cache of"
"""


@dataclass(frozen=True)
class Generation:
    """
    What vLLM made of one model.

    :param model: directory or Hugging Face name
    :param architecture: class in vLLM
    :param kv_cache_tokens: tokens that fit in the KV cache, over all sequences
    :param completions: greedy continuation of each prompt
    :param load_seconds: time to start the engine
    """

    model: str
    architecture: str
    kv_cache_tokens: int
    completions: list[str]
    load_seconds: float


def add_parser(commands: Any) -> None:
    """
    Add the command to the parser's subcommands.

    :param commands: what ``ArgumentParser.add_subparsers`` returned
    """
    parser = commands.add_parser(
        "generate",
        help="complete prompts with one or more models in vLLM",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        type=path,
        metavar="MODEL",
        help="directory or Hugging Face name",
    )
    add(
        "--prompt",
        type=text,
        required=True,
        action="append",
        metavar="TEXT",
        help="what to complete; may be given several times",
    )
    add("--max-tokens", type=positive, default=64, metavar="N", help="(default: 64)")
    add("--dtype", type=text, default="auto", help="as in vLLM (default: auto)")
    add(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="context length to serve (default: the model's)",
    )
    add("--json", type=path, metavar="FILE", help="also write the results there")


def run(args: argparse.Namespace) -> None:
    """
    Run the command.

    :param args: parsed by the parser of ``add_parser``
    """
    results: list[Generation] = []
    for result in generate(args):
        results.append(result)
        ratio = result.kv_cache_tokens / results[0].kv_cache_tokens
        print(f"{result.model}  ({result.architecture})")
        print(f"  KV cache: {result.kv_cache_tokens:,} tokens", end="")
        print(f", {ratio:.3f} times the first model's" if len(results) > 1 else "")
        for prompt, completion in zip(args.prompt, result.completions, strict=True):
            print(f"  {prompt!r} ->")
            print("\n".join(f"    {line}" for line in completion.splitlines()))
        print(flush=True)
    if args.json:
        from nbl_modifier.records.files import write_atomically

        rows = [asdict(result) for result in results]
        write_atomically(args.json, json.dumps(rows, indent=2) + "\n")


def generate(args: argparse.Namespace) -> Iterator[Generation]:
    """
    Yield one result per model, in order.

    :param args: parsed by the parser of ``add_parser``
    :raises RuntimeError: if vLLM fails; the message ends with the tail of its log
    :raises ImportError: if vLLM is not installed
    :raises ValueError: if a directory holds no model
    """
    _check(args)
    for model in args.models:
        yield _generate_one(model, args)


def _check(args: argparse.Namespace) -> None:
    for model in args.models:
        if model.startswith((".", "/", "~")) and not Path(model).exists():
            raise ValueError(f"model {model}: no such directory. Check the path.")
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"model {model}: the directory has no config.json. Pass a checkpoint."
            )
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(
            f"--json {args.json}: there is no folder {Path(args.json).parent}. Make it "
            "first."
        )
    require_vllm()


def _generate_one(model: str, args: argparse.Namespace) -> Generation:
    """Run one engine in a process of its own, so that it gives all memory back."""
    from nbl_modifier.worker import answer_of

    from . import vllm_worker

    job = {
        "model": model,
        "prompts": args.prompt,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
    }
    answer = answer_of(
        vllm_worker.main,
        job,
        subject=f"model {model}: vLLM",
        show_output=args.debug,
        show_errors=args.debug,
    )
    return Generation(model=model, **answer)
