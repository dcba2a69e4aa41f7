# SPDX-License-Identifier: Apache-2.0
"""
Calibration with one process and with several, on the same samples.

Starts torchrun with each number of processes in turn, several rounds, and prints the
seconds of NBL's calibration, their ratio to one process's, and how much the maps differ
from one process's. On a CPU every process gets the same number of threads, so that a
machine with enough cores, or several, shows what each added process is worth; with
fewer cores than processes times threads they only compete.

With `--search`, the whole of it: greedy selection by divergence, refit and
distillation, in every run with as many windows a step as there are processes at most.
`--model` takes a saved model, and Python source as text.

    python benchmarks/distributed.py --processes 1,2 --threads 1
    python benchmarks/distributed.py --processes 1,2 --threads 1 --search --replace 4 \\
        --model MODEL --samples 32 --length 128 --repeats 1
    python benchmarks/distributed.py --processes 1,2,4,8 --hidden-size 4096 \\
        --intermediate-size 14336 --layers 32 --heads 32 --kv-heads 8 \\
        --samples 256 --length 2048 --dtype bfloat16          (on a node with 8 GPUs)
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
if __name__ == "__main__":
    # Read when the packages are imported: no progress bars and logs of the timed runs.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from datasets import Dataset
from llmcompressor import oneshot
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

from benchmarks.random_llama import adding, llama_config
from nbl_modifier import NBLModifier
from nbl_modifier.benchmark.machine import current_device
from nbl_modifier.cli.processes import part_of, process_group
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.report.table import Table

TOKENIZER = Path(__file__).parents[1] / "examples" / "models" / "pycode-4m"


def work(args: argparse.Namespace) -> None:
    """Be one of the processes: calibrate, and let the first one write what came."""
    torch.set_num_threads(args.threads)
    with process_group(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model or TOKENIZER)
        model, rows = subject(args, tokenizer, folder)
        rows = part_of(rows)
        modifier = NBLModifier(**recipe(args, model.config.num_hidden_layers))
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=rows,
            recipe=modifier,
            num_calibration_samples=len(rows),
            max_seq_length=args.length,
            shuffle_calibration_samples=False,
        )
        report = modifier.report
        assert report is not None
        maps = {n: t for n, t in model.state_dict().items() if "attn.linear" in n}
        answer = {
            "seconds": report.calibration_seconds,
            "layers": report.selected_layers,
            "maps": maps,
        }
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(answer, args.worker)


def subject(
    args: argparse.Namespace, tokenizer: Any, folder: str
) -> tuple[PreTrainedModel, Dataset]:
    """
    Return the model, and the samples of all processes.

    :param tokenizer: of ``args.model``, if there is one
    :param folder: for the configuration of a random model
    """
    dtype = getattr(torch, args.dtype)
    if args.model:
        saved = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        texts = stdlib_texts("calibration")
        return saved.eval(), pack(texts, tokenizer, args.length, args.samples)
    config = llama_config(args)
    config.save_pretrained(folder)
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.config._name_or_path = folder
    tokens = torch.randint(0, args.vocab_size, (args.samples, args.length))
    return model, Dataset.from_dict({"input_ids": tokens.tolist()})


def recipe(args: argparse.Namespace, num_layers: int) -> dict[str, Any]:
    """Return the modifier's fields."""
    fields: dict[str, Any] = {"num_layers": args.replace or num_layers // 2}
    if args.search:
        fields |= {
            "criterion": "kl_angle",
            "selection": "greedy",
            "refit": True,
            "distill": {
                "epochs": args.epochs,
                "rate": args.rate,
                "windows_per_step": max(counts_of(args)),
            },
        }
    return fields


def counts_of(args: argparse.Namespace) -> list[int]:
    """Return how many processes there are to be, run by run."""
    return [int(part) for part in args.processes.split(",")]


def start(count: int, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """
    Run ``count`` processes and return what the first one wrote.

    :param options: of this command, passed on
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.pt"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(count), __file__, *options]
        subprocess.run(
            [*torchrun, "--worker", str(answer)],
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            check=True,
        )
        found: dict[str, Any] = torch.load(answer)
        return found


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest relative difference of two runs' maps, Frobenius."""
    if mine["maps"].keys() != theirs["maps"].keys():
        return float("inf")
    return max(
        float(
            torch.linalg.norm((mine["maps"][name] - theirs["maps"][name]).double())
            / torch.linalg.norm(theirs["maps"][name].double())
        )
        for name in theirs["maps"]
    )


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = adding(
        parser,
        hidden_size=512,
        intermediate_size=1792,
        layers=8,
        heads=8,
        kv_heads=2,
        vocab_size=8000,
    )
    add("--processes", "1,2", "how many, a list that begins with 1")
    add("--threads", 1, "of each process, on a CPU")
    add("--repeats", 3, "rounds")
    add("--samples", 64, "calibration sequences of all processes together")
    add("--length", 512, "tokens per sequence")
    add("--dtype", "float32", "of the model")
    add("--model", "", "a saved model instead of a random one")
    add("--replace", 0, "layers to replace; 0: half of them")
    parser.add_argument(
        "--search", action="store_true", help="greedily, with refit and distillation"
    )
    add("--epochs", 1, "of distillation")
    add("--rate", 0.03, "of distillation")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure each number of processes in turn, print a markdown table."""
    args = parse_args()
    if args.worker:
        work(args)
        return
    options = sys.argv[1:]
    counts = counts_of(args)
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(args.repeats):
        for count in counts:
            runs[count].append(start(count, args, options))
    random = f"{args.layers} layers, hidden size {args.hidden_size}"
    print(
        f"{Path(args.model).name or random}, {args.dtype}, {args.samples} x "
        f"{args.length} tokens, {current_device()}, "
        f"{os.cpu_count()} cores, {args.threads} threads per process, "
        f"{args.repeats} rounds, median (min..max)\n"
    )
    what = "search" if args.search else "calibration"
    header = ("processes", f"{what}, s", "times faster", "of ideal")
    rows = []
    alone = runs[counts[0]]
    for count in counts:
        seconds = [run["seconds"] for run in runs[count]]
        pairs = zip(alone, runs[count], strict=True)
        faster = [one["seconds"] / many["seconds"] for one, many in pairs]
        median = statistics.median(faster)
        cells = (
            str(count),
            f"{statistics.median(seconds):.2f} "
            f"({min(seconds):.2f}..{max(seconds):.2f})",
            f"{median:.2f} ({min(faster):.2f}..{max(faster):.2f})",
            f"{median / count:.0%}",
            "" if count == 1 else f"{difference(runs[count][0], alone[0]):.1e}",
        )
        rows.append(cells)
    print(Table((*header, "maps differ by"), rows).to_markdown())


if __name__ == "__main__":
    main()
