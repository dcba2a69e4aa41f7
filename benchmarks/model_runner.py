# SPDX-License-Identifier: Apache-2.0
"""
Linearized checkpoints in vLLM as a GPU runs it: compiled, with CUDA graphs, model
runner V2, on two GPUs, asleep and awake again.

First the checkpoints, where llm-compressor is, then a check, with an interpreter that
has vLLM:

    python benchmarks/model_runner.py compress examples/models/pycode-4m checkpoints
    python benchmarks/model_runner.py check runners checkpoints --serve-python PYTHON

A check runs vLLM in each of its settings and once more with ``enforce_eager``, prompts
the same, and prints how many greedy tokens are those of eager mode, how far their
log-probabilities are off, and how many times the tokens of the base model the KV cache
holds, of the same memory. It fails if a capacity is not K / (K - m), or if a token
differs where its log-probability does not tell of a tie.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Of the integration tests: one engine in a process of the serve environment.
WORKER = ROOT / "integration_tests" / "vllm_worker.py"
DTYPE = "float32"  # so that ties are rare
NUM_PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 8, 96, 32
LENGTH = 512
# Whole blocks of every engine; large enough that rounding to them does not show.
CACHE_BYTES = 2**28
CAPACITY_TOLERANCE = 1e-2
# Kernels add up in other orders. In float32 the tests allow 1e-3 for the same reason.
LOGPROB_TOLERANCE = 1e-2

BASE, SIX, FIRST, LAST, ONE_LEFT = "base", "six", "first", "last", "one-left"
GRAPHS = ("PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


@dataclass(frozen=True)
class Case:
    """
    One setting of vLLM.

    :param name: for the table
    :param checkpoint: which one
    :param engine: arguments of ``vllm.LLM``
    :param environment: variables
    :param repeat: run the prompts twice; the second time's tokens count as well
    :param sleep: level to sleep at before the second time
    """

    name: str
    checkpoint: str = SIX
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    repeat: bool = False
    sleep: int = 0


def _graphs(checkpoint: str) -> list[Case]:
    return [
        Case(mode, checkpoint, {"compilation_config": {"cudagraph_mode": mode}})
        for mode in GRAPHS
    ]


_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
CHECKS: dict[str, list[Case]] = {
    "runners": [
        Case("default"),
        Case("V1", environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    ],
    **{f"graphs-{name}": _graphs(name) for name in (FIRST, LAST, ONE_LEFT)},
    "features": [
        Case("n-gram speculation", engine={"speculative_config": _NGRAM}),
        Case(
            "chunked prefill, prefix cache",
            engine={"max_num_batched_tokens": 64, "max_num_seqs": 8},
            repeat=True,
        ),
        Case("sleep 1", engine={"enable_sleep_mode": True}, repeat=True, sleep=1),
        Case("sleep 2", engine={"enable_sleep_mode": True}, repeat=True, sleep=2),
    ],
    "parallel": [
        Case("tensor parallel", engine={"tensor_parallel_size": 2}),
        Case("pipeline parallel", engine={"pipeline_parallel_size": 2}),
    ],
}


def compress(model: str, folder: Path) -> None:
    """
    Write the checkpoints, from one calibration, and the prompts for them.

    :param model: directory
    :param folder: to be
    """
    from transformers import AutoConfig, AutoTokenizer

    from nbl_modifier.cli import main as nbl
    from nbl_modifier.evaluation.texts import stdlib_texts
    from nbl_modifier.evaluation.token_windows import pack

    count = AutoConfig.from_pretrained(model).num_hidden_layers
    layers = {
        SIX: list(range(count - 6, count)),
        FIRST: [0],
        LAST: [count - 1],
        ONE_LEFT: [i for i in range(count) if i != count // 2],
    }
    folder.mkdir(parents=True, exist_ok=True)
    statistics = str(folder / "statistics")
    rank = ["rank", model, "--statistics", statistics, "--num-samples", "64"]
    if nbl([*rank, "--max-seq-length", "256"]):
        sys.exit(1)
    for name, chosen in layers.items():
        recipe = folder / f"{name}.yaml"
        fields = {"layers": chosen, "statistics": statistics}
        stage = {"default_modifiers": {"NBLModifier": fields}}
        recipe.write_text(json.dumps({"default_stage": stage}), encoding="utf-8")
        command = ["compress", model, "--recipe", str(recipe), "--heldout", "none"]
        if nbl([*command, "--output", str(folder / name), "--overwrite"]):
            sys.exit(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = stdlib_texts("heldout")
    rows = pack(texts, tokenizer, PROMPT_TOKENS, NUM_PROMPTS)["input_ids"]
    about = {
        "base": str(Path(model).resolve()),
        "num_layers": count,
        "linearized": {name: len(chosen) for name, chosen in layers.items()},
        "prompts": [list(row) for row in rows],
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def run(python: str, folder: Path, about: dict[str, Any], case: Case) -> dict[str, Any]:
    """
    Run one engine and return the worker's answer, and which model ``runner`` it had.

    :param python: interpreter that has vLLM
    :param folder: of the checkpoints
    :param about: what :func:`compress` wrote beside them
    """
    model = about["base"] if case.checkpoint == BASE else folder / case.checkpoint
    settings = {
        "dtype": DTYPE,
        "max_model_len": LENGTH,
        "kv_cache_memory_bytes": CACHE_BYTES,
    }
    job = {
        "model": str(model),
        "engine": settings | case.engine,
        "prompts": about["prompts"],
        "max_tokens": MAX_TOKENS,
        "repeat": case.repeat,
        "sleep": case.sleep,
        "environment": case.environment,
        "in_process": False,
    }
    with tempfile.TemporaryDirectory() as temporary:
        job_path, result = (Path(temporary) / each for each in ("job", "result"))
        job_path.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [python, str(WORKER), str(job_path), str(result)],
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not result.exists():
            return {"error": done.stdout[-1500:]}
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    answer["runner"] = "V2" if "Using V2 Model Runner" in done.stdout else "V1"
    return answer


def compare(
    found: dict[str, Any], eager: dict[str, Any]
) -> tuple[int, int, float, list[int]]:
    """
    Return tokens in common, tokens in all, the largest difference, and real failures.

    :param found: an engine's answer
    :param eager: that of the reference
    :return: the log-probability's difference is that of the tokens in common; failures
        are numbers of prompts whose tokens part where the log-probabilities do not tell
        of a tie
    """
    same = total = 0
    largest = 0.0
    failures = []
    fields = ("tokens", "token_logprobs")
    rows = zip(*(each[name] for each in (found, eager) for name in fields), strict=True)
    for number, (mine, my_logs, theirs, their_logs) in enumerate(rows):
        pairs = list(zip(mine, theirs, strict=True))
        parted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same, total = same + parted, total + len(pairs)
        logs = list(zip(my_logs, their_logs, strict=True))
        largest = max([largest, *(abs(a - b) for a, b in logs[:parted])])
        # Each chose the likeliest: of a tie, both have the same log-probability.
        if (
            parted < len(pairs)
            and abs(logs[parted][0] - logs[parted][1]) > LOGPROB_TOLERANCE
        ):
            failures.append(number)
    return same, total, largest, failures


def check(name: str, folder: Path, python: str) -> int:
    """
    Run the cases of a check, print a markdown table, return how many failed.

    :param name: a key of ``CHECKS``
    :param folder: of the checkpoints
    :param python: interpreter that has vLLM
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    eager = {"enforce_eager": True}
    base = run(python, folder, about, Case("eager", BASE, eager))
    if base["error"]:
        sys.exit(f"the base model does not run: {base['error']}")
    print(
        "| checkpoint | setting | runner | greedy tokens as eager | largest difference "
        "of log-probabilities | KV cache, times base (K / (K - m)) | |"
    )
    print("|---|---|---|---:|---:|---:|---|")
    references: dict[str, dict[str, Any]] = {}
    failed = 0
    for case in CHECKS[name]:
        if case.checkpoint not in references:
            answer = run(python, folder, about, Case("eager", case.checkpoint, eager))
            references[case.checkpoint] = answer
        line, good = row(
            case, run(python, folder, about, case), about, base, references
        )
        print(line, flush=True)
        failed += not good
    return failed


def row(
    case: Case,
    found: dict[str, Any],
    about: dict[str, Any],
    base: dict[str, Any],
    references: dict[str, dict[str, Any]],
) -> tuple[str, bool]:
    """Return a line of the table, and whether all is as it has to be."""
    eager = references[case.checkpoint]
    error = found["error"] or eager["error"]
    if error:
        last = error.strip().splitlines()[-1]
        return f"| {case.checkpoint} | {case.name} | | | | | {last} |", False
    same, total, largest, failures = compare(found, eager)
    layers, linear = about["num_layers"], about["linearized"][case.checkpoint]
    expected = layers / (layers - linear)
    ratio = found["kv_cache_tokens"] / base["kv_cache_tokens"]
    remarks = [f"prompt {number} differs" for number in failures]
    if abs(ratio / expected - 1) > CAPACITY_TOLERANCE and "parallel" not in case.name:
        remarks.append("wrong capacity")
    if case.repeat and found["repeated"]["tokens"] != found["tokens"]:
        remarks.append("other tokens the second time")
    cells = [
        *(case.checkpoint, case.name, found["runner"], f"{same} of {total}"),
        *(f"{largest:.1e}", f"{ratio:.3f} ({expected:.3f})", "; ".join(remarks)),
    ]
    return f"| {' | '.join(cells)} |", not remarks


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the number of failed cases, at most 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    first = commands.add_parser("compress")
    first.add_argument("model")
    first.add_argument("folder", type=Path)
    second = commands.add_parser("check")
    second.add_argument("name", choices=CHECKS)
    second.add_argument("folder", type=Path)
    second.add_argument("--serve-python", default=sys.executable)
    args = parser.parse_args(arguments)
    if args.what == "compress":
        compress(args.model, args.folder)
        return 0
    return int(check(args.name, args.folder, args.serve_python) > 0)


if __name__ == "__main__":
    sys.exit(main())
