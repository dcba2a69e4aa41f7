# SPDX-License-Identifier: Apache-2.0
"""
Calibrate a model that does not fit in memory.

Writes a random Llama to disk, a layer at a time, then compresses it in a process of
its own per setting, loaded as llm-compressor loads what is larger than the machine: as
much as ``--in-memory`` says on the CPU (or the GPU), the rest on disk, read when it
runs. The most memory that was resident by then, sampled, stands beside the weights:

    python benchmarks/large_model.py --limit 2

*private* is what the process allocated; the rest of what is resident are pages of the
weights' files, which the system takes back when it needs them. What ``import`` takes is
in both. A setting that goes beyond the limit, or fails, is marked, and the exit code is
then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
if __name__ == "__main__":
    # Read when the packages are imported: no progress bars and logs of the timed runs.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.random_llama import adding, llama_config

TOKENIZER = Path(__file__).parents[1] / "examples" / "models" / "pycode-4m"
INDEX = "model.safetensors.index.json"
SAMPLE_SECONDS = 0.02
# fields of NBLModifier beside num_layers
SETTINGS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "greedy, by the divergence": {"criterion": "kl", "selection": "greedy"},
    "greedy, by the bound": {"selection": "greedy"},
    "refit": {"refit": True},
    "distillation, 1 epoch": {"distill": {"epochs": 1, "rate": 0.03}},
}


class Resident:
    """The most memory of this process between entering and leaving the block."""

    def __init__(self) -> None:
        self.bytes = self.private = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            sizes = dict(re.findall(r"^(\w+):\s*(\d+) kB$", status, re.M))
            self.bytes = max(self.bytes, 1024 * int(sizes["VmRSS"]))
            self.private = max(self.private, 1024 * int(sizes["RssAnon"]))
            if self._over.wait(SAMPLE_SECONDS):
                return


def write_model(folder: Path, args: argparse.Namespace) -> int:
    """
    Write a random checkpoint without ever having more than a layer of it in memory.

    :param folder: directory to be
    :param args: the command line
    :return: bytes of the weights
    """
    config = llama_config(args)
    config.dtype = args.dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in model.state_dict().items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        shard = name.replace(".", "-") if layer is None else f"layer-{layer[1]}"
        shards.setdefault(f"{shard}.safetensors", {})[name] = weight
    generator = torch.Generator().manual_seed(0)
    total, places = 0, dict[str, str]()
    for shard, weights in shards.items():
        tensors = {
            name: (
                torch.ones(weight.shape)
                if weight.ndim == 1
                else torch.randn(weight.shape, generator=generator) * 0.02
            ).to(getattr(torch, args.dtype))
            for name, weight in weights.items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return total


def compress(setting: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """
    Load the model, compress and save it; called in a process of its own.

    :param setting: a key of ``SETTINGS``
    :param folder: where the model is
    :param args: the command line
    :return: ``seconds``, ``passes`` and ``resident`` and ``private`` bytes, or
        ``error``
    """
    from compressed_tensors.offload import load_offloaded_model
    from datasets import Dataset
    from llmcompressor import oneshot

    from nbl_modifier import NBLModifier

    generator = torch.Generator().manual_seed(0)
    shape = (args.samples, args.length)
    tokens = torch.randint(args.vocab_size, shape, generator=generator)
    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    with temporary(args) as place, Resident() as memory:
        started_at = time.perf_counter()
        try:
            with load_offloaded_model():
                model = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype="auto",
                    device_map="auto",
                    max_memory={args.device: int(args.in_memory * 1e9)},
                    offload_folder=str(place / "offload"),
                )
            modifier = NBLModifier(num_layers=args.num_layers, **SETTINGS[setting])
            oneshot(
                model=model,
                processor=tokenizer,
                dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
                recipe=modifier,
                num_calibration_samples=args.samples,
                max_seq_length=args.length,
                shuffle_calibration_samples=False,
                output_dir=str(place / "output"),
            )
        except Exception as err:  # noqa: BLE001  # a row says what it was
            return {"error": f"{type(err).__name__}: {err}".splitlines()[0]}
        seconds = time.perf_counter() - started_at
    return {
        "seconds": seconds,
        "passes": modifier._run.progress.passes,
        "resident": memory.bytes,
        "private": memory.private,
    }


@contextlib.contextmanager
def temporary(args: argparse.Namespace) -> Iterator[Path]:
    """Make a folder where the command line says, for the time of the block."""
    place = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # 3 GB in float32, of which few numbers are multiplied: a wide MLP of few layers
    add = adding(
        parser,
        hidden_size=1024,
        intermediate_size=24576,
        layers=9,
        heads=16,
        kv_heads=4,
        vocab_size=32000,
    )
    add("--dtype", "float32", "of the weights")
    add("--samples", 8, "calibration sequences")
    add("--length", 256, "tokens per sequence")
    add("--num-layers", 3, "layers to replace")
    add("--in-memory", 0.3, "GB of weights that are kept on the device")
    add("--device", "cpu", "that computes; cpu, or a GPU by its number")
    add("--limit", 2.0, "GB that may be resident")
    parser.add_argument(
        "--setting", choices=SETTINGS, action="append", help="only this one (all)"
    )
    parser.add_argument("--folder", help="for the model, and for what is on disk")
    args = parser.parse_args(arguments)
    args.device = int(args.device) if args.device.isdigit() else args.device
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Write the model, compress it in each setting, print a markdown table.

    :param arguments: the command line; None: this process's
    """
    args = parse_args(arguments)
    failed = False
    with temporary(args) as folder:
        total = write_model(folder, args)
        print(
            f"{total / 1e9:.2f} GB of weights, {args.in_memory:g} GB of them in "
            f"memory, {args.limit:g} GB may be resident; {args.layers} layers, "
            f"d = {args.hidden_size}, {args.dtype}, {args.samples} x {args.length} "
            f"tokens, {args.num_layers} replaced, {torch.get_num_threads()} threads\n"
        )
        print("| setting | s | forward passes | resident, GB | private, GB | |")
        print("|---|---:|---:|---:|---:|---|", flush=True)
        context = multiprocessing.get_context("spawn")
        for setting in args.setting or SETTINGS:
            with context.Pool(1) as pool:
                found = pool.apply(compress, (setting, str(folder), args))
            if "error" in found:
                cells, remark = ["", "", "", ""], found["error"]
            else:
                cells = [f"{found['seconds']:.1f}", f"{found['passes']:.1f}"]
                cells += [f"{found[k] / 1e9:.2f}" for k in ("resident", "private")]
                within = found["resident"] <= args.limit * 1e9
                remark = "" if within else "beyond the limit"
            failed |= bool(remark)
            print(f"| {setting} | {' | '.join(cells)} | {remark} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
