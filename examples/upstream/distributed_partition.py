# SPDX-License-Identifier: Apache-2.0
"""
llm-compressor's processes calibrate on the same samples, and say that they do not.

If all have the same data, each takes its part of it, draws indices for that part, and
then uses them on the whole (llmcompressor 0.14.0.1, datasets/utils.py,
``_make_sampler`` and its caller): all processes read the first part.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from datasets import Dataset
from llmcompressor.args import DatasetArguments
from llmcompressor.datasets.utils import format_calibration_data
from transformers import PreTrainedTokenizerBase

WORLD_SIZE, SAMPLES = 2, 8


def read(rank: int, folder: str) -> None:
    """Write the first tokens of the samples that one of the processes would read."""
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    dataset = Dataset.from_dict(
        {
            "input_ids": [[number] * 4 for number in range(SAMPLES)],
            "attention_mask": [[1] * 4] * SAMPLES,
        }
    )
    arguments = DatasetArguments(
        dataset=dataset,
        num_calibration_samples=SAMPLES,
        shuffle_calibration_samples=False,
    )
    loader = format_calibration_data(arguments, dataset, PreTrainedTokenizerBase())
    samples = sorted(int(batch["input_ids"][0, 0]) for batch in loader)
    (Path(folder) / f"{rank}").write_text(" ".join(map(str, samples)), "utf-8")
    dist.destroy_process_group()


def main() -> int:
    """Return 0 if it is as described."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(read, (folder,), nprocs=WORLD_SIZE)
        parts = [
            (Path(folder) / f"{rank}").read_text("utf-8") for rank in range(WORLD_SIZE)
        ]
    print(f"samples 0 to {SAMPLES - 1}, read by process")
    for rank, part in enumerate(parts):
        print(f"  {rank}: {part}")
    return int(parts[0] != parts[1])


if __name__ == "__main__":
    sys.exit(main())
