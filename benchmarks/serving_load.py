# SPDX-License-Identifier: Apache-2.0
"""
A loaded server at the limit of its KV cache: base model and linearized checkpoints.

In the environment that serves, with vLLM's own client (``vllm bench serve``):

    .venv/serve/bin/python benchmarks/serving_load.py BASE NBL-m8 NBL-m15

Each model gets the same bytes of KV cache, such that the base model holds
``--kv-cache-tokens``, and the same requests: short and long prompts in random order,
half of them behind one of a few shared beginnings, as many at once as ``--concurrency``
says, answers of different lengths that are generated to their ends. Where running
sequences need more than the cache holds, vLLM takes one of them out and computes it
again later: a preemption.

Servers run one after the other, in rounds, every other one in reverse, each started
anew: so the time from the command to the first answer is measured too, and the most
memory that was resident in one of its processes by then. Their compiled code is cached
from the second start on, unless ``--enforce-eager``, the default on CPUs, compiles
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

import nbl_modifier.hf
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.kv_cache import KVCache
from nbl_modifier.report.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from integration_tests.server import Server, serving  # noqa: E402  # from the line above

PREFIXES, PREFIX_TOKENS = 4, 256
SHORT, LONG = (16, 128), (256, 768)
ANSWERS = (64, 384)
# A large model, compiled for the first time.
PATIENCE_SECONDS = 1200
#: Columns: name, key of a round's figures, digits.
FIGURES: list[tuple[str, str, int]] = [
    ("ready after, s", "start_seconds", 1),
    ("peak memory of loading, MB", "peak_megabytes", 0),
    ("output tokens/s", "output_throughput", 1),
    ("tokens/s in all", "total_token_throughput", 1),
    ("first token, p50, s", "ttft_p50", 2),
    ("first token, p99, s", "ttft_p99", 2),
    ("whole answer, p50, s", "e2el_p50", 2),
    ("whole answer, p99, s", "e2el_p99", 2),
    ("preemptions", "preemptions", 0),
    ("prompt tokens from the prefix cache", "cached", 3),
]
_COMPARED = ("output_throughput", "ttft_p50", "ttft_p99", "e2el_p50", "e2el_p99")

Round = dict[str, float]


def write_requests(tokenizer: Any, count: int, path: Path) -> tuple[int, int]:
    """
    Write the requests, one JSON object per line, in the order in which they are sent.

    :param tokenizer: of the base model
    :param count: how many
    :param path: file to be
    :return: tokens of all prompts, about, and of all answers
    """
    generator = random.Random(0)
    text = "\n".join(stdlib_texts("heldout"))[: 40 * count * (PREFIX_TOKENS + LONG[1])]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    beginnings = [
        ids[PREFIX_TOKENS * i : PREFIX_TOKENS * (i + 1)] for i in range(PREFIXES)
    ]
    prompt_tokens = answer_tokens = 0
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            # of four requests: short and long, with and without a shared beginning
            length = generator.randint(*(LONG if number % 2 else SHORT))
            start = generator.randrange(len(ids) - length)
            prompt = ids[start : start + length]
            if number % 4 > 1:
                prompt = generator.choice(beginnings) + prompt
            answer = generator.randint(*ANSWERS)
            row = {"prompt": tokenizer.decode(prompt), "output_tokens": answer}
            file.write(json.dumps(row) + "\n")
            prompt_tokens, answer_tokens = (
                prompt_tokens + len(prompt),
                answer_tokens + answer,
            )
    return prompt_tokens, answer_tokens


def cache_bytes(model: Path, dtype: str, tokens: int) -> int:
    """Return the bytes of the KV cache that ``tokens`` of a model take."""
    config = AutoConfig.from_pretrained(model).get_text_config().to_dict()
    return int(KVCache.from_config(config | {"dtype": dtype}).size(tokens))


def load(
    server: Server, model: Path, requests: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """
    Send the requests and return what vLLM's client found.

    :param server: running
    :param model: what it serves
    :param requests: from :func:`write_requests`
    :param args: the command line
    """
    result = requests.with_name("result.json")
    done = subprocess.run(
        [
            *(vllm(), "bench", "serve", "--backend", "openai"),
            *("--base-url", server.url, "--endpoint", "/v1/completions"),
            *("--model", str(model), "--dataset-name", "custom", "--dataset-path"),
            *(str(requests), "--custom-output-len", "-1", "--skip-chat-template"),
            *("--disable-shuffle", "--ignore-eos", "--temperature", "0"),
            *("--num-prompts", str(args.requests)),
            *("--max-concurrency", str(args.concurrency)),
            *("--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99"),
            *("--save-result", "--result-dir", str(result.parent)),
            *("--result-filename", result.name, "--disable-tqdm"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"vllm bench serve failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if found["completed"] != args.requests:
        sys.exit(f"{model}: {found['completed']} of {args.requests} requests answered")
    return found


def vllm() -> str:
    """Return the command of the environment that this process runs in."""
    return str(Path(sys.executable).with_name("vllm"))


def measure(
    model: Path, nbytes: int, requests: Path, args: argparse.Namespace
) -> Round:
    """
    Start a server, load it, end it.

    :param model: checkpoint
    :param nbytes: of the KV cache
    :param requests: from :func:`write_requests`
    :param args: the command line
    """
    options = ["--dtype", args.dtype, "--kv-cache-memory-bytes", str(nbytes)]
    options += ["--max-model-len", str(args.max_model_len)]
    options += ["--max-num-seqs", str(args.concurrency)]
    if args.data_parallel > 1:
        options += ["--data-parallel-size", str(args.data_parallel)]
    if args.enforce_eager:
        options.append("--enforce-eager")
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = requests.with_name("server.log")
    with serving(
        *(vllm(), model, log, environment | os.environ, *options, *args.serve),
        patience=PATIENCE_SECONDS,
    ) as server:
        found = load(server, model, requests, args)
        return {
            "start_seconds": server.start_seconds,
            "peak_megabytes": server.start_peak_bytes / 1e6,
            "kv_cache_tokens": server.kv_cache_tokens() * args.data_parallel,
            "output_throughput": found["output_throughput"],
            "total_token_throughput": found["total_token_throughput"],
            **{
                f"{what}_p{p}": found[f"p{p}_{what}_ms"] / 1000
                for what in ("ttft", "e2el")
                for p in (50, 99)
            },
            "preemptions": server.counter("vllm:num_preemptions_total"),
            "cached": server.counter("vllm:prefix_cache_hits_total")
            / server.counter("vllm:prefix_cache_queries_total"),
        }


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median and, where they differ, the least and the greatest."""
    low, middle, high = (
        f"{value:,.{digits}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low}..{high})"


def tables(names: Sequence[str], rounds: dict[str, list[Round]]) -> str:
    """
    Return what was measured, and what it is times the base model's.

    :param names: of the models, the base first
    :param rounds: figures of each round by name
    """
    base = names[0]
    tokens = [f"{rounds[name][0]['kv_cache_tokens']:,.0f}" for name in names]
    rows = [("tokens in the KV cache", *tokens)]
    for title, key, digits in FIGURES:
        cells = [spread([r[key] for r in rounds[name]], digits) for name in names]
        rows.append((title, *cells))
        if key in _COMPARED:
            pairs = (zip(rounds[name], rounds[base], strict=True) for name in names)
            cells = [spread([a[key] / b[key] for a, b in pair], 3) for pair in pairs]
            rows.append(("times base, of the same round", *cells))
    return Table(("", *names), rows).to_markdown()


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", type=Path, help="the base model, then checkpoints of it")
    add("--kv-cache-tokens", type=int, default=6144, help="of the base model (6144)")
    add("--requests", type=int, default=64, help="of each round (64)")
    add("--concurrency", type=int, default=16, help="requests at once (16)")
    add("--rounds", type=int, default=2, help="each of all models (2)")
    add("--dtype", default="float32", help="of weights and cache (float32)")
    add("--max-model-len", type=int, default=2048, help="(2048)")
    add("--data-parallel", type=int, default=1, help="engines, a cache each (1)")
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=not torch.accelerator.is_available(),
        help="without compilation (default: on a CPU only)",
    )
    add("--output", type=Path, help="file for the figures of all rounds, JSON")
    add(
        "--serve",
        nargs=argparse.REMAINDER,
        default=[],
        help="whatever follows goes to vllm serve",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Measure all models in rounds and print a markdown table.

    :param arguments: the command line; None: this process's
    """
    args = parse_args(arguments)
    nbl_modifier.hf.register()
    base = args.models[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    nbytes = cache_bytes(base, args.dtype, args.kv_cache_tokens)
    names = [str(model) for model in args.models]
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        prompts, answers = write_requests(tokenizer, args.requests, requests)
        print(
            f"{args.requests} requests, {args.concurrency} at once, {prompts:,} tokens "
            f"of prompts and {answers:,} of answers; KV cache {nbytes / 1e6:,.0f} MB"
            f"{f' x {args.data_parallel}' if args.data_parallel > 1 else ''}, "
            f"{args.dtype}, {args.rounds} rounds: median (min..max)\n",
            flush=True,
        )
        for number in range(args.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                found = measure(Path(name), nbytes, requests, args)
                rounds[name].append(found)
                print(f"round {number}: {name}: {found}", file=sys.stderr, flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(rounds, indent=2), encoding="utf-8")
    print(tables(names, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
