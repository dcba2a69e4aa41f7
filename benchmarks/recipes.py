# SPDX-License-Identifier: Apache-2.0
"""
What each recipe in recipes/ costs and gains on the bundled model.

Runs ``nbl compress`` with each recipe, then each checkpoint in vLLM, and prints a
Markdown table. The paper's recipes are left out: they are for models of 32 and 80
layers. Needs both environments::

    python benchmarks/recipes.py --serve-python .venv/serve/bin/python
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

import nbl_modifier.hf
from nbl_modifier.cli import main as nbl
from nbl_modifier.cli.results import weight_bytes
from nbl_modifier.evaluation import PerplexityResult, perplexity
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.report.table import Table

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "pycode-4m"
# Of the integration tests: one engine in a process of the serve environment.
WORKER = ROOT / "integration_tests" / "vllm_worker.py"
BASE = "dense base"
# The model was trained on windows of 256 tokens.
SEQ_LENGTH = 256
LOG_TAIL_LINES = 25
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # The worker sends a function to its engine, which is ours and on this machine.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


@dataclass
class Measurements:
    """
    What vLLM made of one checkpoint.

    :param kv_cache_tokens: tokens that fit in the KV cache
    :param tokens_per_second: median over the timed runs of an engine, by round
    """

    kv_cache_tokens: int
    tokens_per_second: list[float]


def compress(recipe: Path, directory: Path, num_samples: int) -> None:
    """
    Write the bundled model, compressed, to ``directory``.

    :param recipe: YAML file
    :param directory: checkpoint to be
    :param num_samples: calibration sequences
    """
    with contextlib.redirect_stdout(sys.stderr):
        code = nbl(
            [
                *("compress", str(MODEL), "--recipe", str(recipe)),
                *("--output", str(directory), "--heldout", "none"),
                *("--max-seq-length", str(SEQ_LENGTH), "--batch-size", "8"),
                *("--num-samples", str(num_samples)),
            ]
        )
    if code:
        sys.exit(code)


def heldout_perplexities(
    checkpoints: dict[str, Path], num_windows: int
) -> dict[str, PerplexityResult]:
    """Return the perplexity of each checkpoint as transformers loads it."""
    nbl_modifier.hf.register()
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    windows = pack(stdlib_texts("heldout"), tokenizer, SEQ_LENGTH, num_windows)
    return {
        name: perplexity(
            AutoModelForCausalLM.from_pretrained(path, dtype="auto"), windows
        )
        for name, path in checkpoints.items()
    }


@functools.cache
def prompts(count: int, length: int) -> list[list[int]]:
    """Return ``count`` beginnings of held-out texts, ``length`` tokens each."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    rows = pack(stdlib_texts("heldout"), tokenizer, length, count)["input_ids"]
    return [list(row) for row in rows]


def serve(directory: Path, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """
    Run one engine and return the worker's answer.

    :param directory: checkpoint
    :param args: the command line
    :param cache: folder for what vLLM caches
    """
    job = {
        "model": str(directory),
        # Without the prefix cache, which would spare every run but the first its work.
        "engine": {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 512,
            "enable_prefix_caching": False,
        },
        "prompts": prompts(args.batch_size, args.prompt_tokens),
        "max_tokens": args.max_tokens,
        "timed_runs": args.timed_runs,
        "in_process": True,
        "sabotage": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        job_file, answer_file = Path(folder) / "job.json", Path(folder) / "answer.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        process = subprocess.run(
            [args.serve_python, str(WORKER), str(job_file), str(answer_file)],
            env=VLLM_ENVIRONMENT | {"VLLM_CACHE_ROOT": str(cache)} | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        answer: dict[str, Any] = {"error": f"exit code {process.returncode}"}
        if answer_file.exists():
            answer = json.loads(answer_file.read_text(encoding="utf-8"))
    if answer["error"] is not None:
        tail = "\n".join(process.stdout.splitlines()[-LOG_TAIL_LINES:])
        sys.exit(f"{directory.name} in vLLM: {answer['error']}\n{tail}")
    return answer


def measure(
    checkpoints: dict[str, Path], args: argparse.Namespace, cache: Path
) -> dict[str, Measurements]:
    """
    Run all checkpoints in vLLM in turn, several rounds, one engine at a time.

    :param checkpoints: directories by name
    :param args: the command line
    :param cache: folder for what vLLM caches
    """
    results: dict[str, Measurements] = {}
    for number in range(args.rounds):
        for name, directory in checkpoints.items():
            print(f"vLLM, round {number + 1}: {name}", file=sys.stderr, flush=True)
            answer = serve(directory, args, cache)
            result = results.setdefault(
                name, Measurements(answer["kv_cache_tokens"], [])
            )
            result.tokens_per_second.append(
                statistics.median(answer["tokens_per_second"])
            )
    return results


def spread(ratios: Sequence[float]) -> str:
    """Return median, least and greatest."""
    median = statistics.median(ratios)
    return f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(
    checkpoints: dict[str, Path],
    perplexities: dict[str, PerplexityResult],
    served: dict[str, Measurements],
) -> str:
    """
    Return the Markdown table, ratios to the first row's.

    :param checkpoints: directories by name, the base model first
    :param perplexities: by the same names
    :param served: by the same names
    """
    header = (
        *("recipe", "size on disk, MB", "held-out perplexity", "times base"),
        *("KV cache in vLLM, tokens", "tokens/s, times base"),
    )
    rows = []
    base, base_served = perplexities[BASE], served[BASE]
    for name, directory in checkpoints.items():
        ratio, error = perplexities[name].relative_to(base)
        tokens = served[name].kv_cache_tokens
        pairs = zip(
            served[name].tokens_per_second, base_served.tokens_per_second, strict=True
        )
        cells = (
            name,
            f"{weight_bytes(str(directory)) / 1e6:.2f}",
            f"{perplexities[name].perplexity:.2f}",
            "1" if name == BASE else f"{ratio:.4f} ± {error:.4f}",
            f"{tokens:,} ({tokens / base_served.kv_cache_tokens:.2f}x)",
            "1" if name == BASE else spread([own / other for own, other in pairs]),
        )
        rows.append(cells)
    return Table(header, rows).to_markdown()


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--serve-python",
        default=str(ROOT / ".venv" / "serve" / "bin" / "python"),
        help="interpreter of the environment vLLM is in (default: %(default)s)",
    )
    for name, default in {
        "--num-samples": 64,
        "--heldout-samples": 64,
        "--rounds": 3,
        "--timed-runs": 5,
        "--batch-size": 8,
        "--prompt-tokens": 64,
        "--max-tokens": 64,
    }.items():
        parser.add_argument(name, type=int, default=default, metavar="N")
    args = parser.parse_args()
    if not Path(args.serve_python).exists():
        parser.error(f"--serve-python {args.serve_python}: not found. make env-serve")
    return args


def main() -> int:
    """Compress, measure and print."""
    args = parse_arguments()
    if not torch.accelerator.is_available():
        # AWQ pins its cache, which torch refuses there (llmcompressor 0.14.0.1,
        # modifiers/transform/awq/base.py, ``_setup_activation_cache_hooks``).
        IntermediatesCache.pin_memory = lambda *_, **__: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {BASE: MODEL}
        for recipe in sorted((ROOT / "recipes").glob("nbl*.yaml")):
            checkpoints[recipe.stem] = Path(folder) / recipe.stem
            compress(recipe, checkpoints[recipe.stem], args.num_samples)
        perplexities = heldout_perplexities(checkpoints, args.heldout_samples)
        served = measure(checkpoints, args, Path(folder) / "vllm_cache")
        print(table(checkpoints, perplexities, served))
    predicted = perplexities[BASE].num_tokens
    speeds = served[BASE].tokens_per_second
    print(
        f"\nPerplexity on {predicted:,} tokens. tokens/s: {args.batch_size} prompts of "
        f"{args.prompt_tokens} tokens at once, {args.max_tokens} generated for each; "
        f"median and range of the ratio over {args.rounds} rounds of all models in "
        f"turn, each engine's figure the median of {args.timed_runs} runs; dense base "
        f"{min(speeds):,.0f} to {max(speeds):,.0f}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
