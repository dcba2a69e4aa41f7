# SPDX-License-Identifier: Apache-2.0
"""
One process of a distributed calibration, started by ``test_processes.py``:

    torchrun --nproc-per-node 2 distributed_run.py JOB.json

``JOB.json``: ``model`` and ``dtype`` to load it in, ``recipe``: fields of
``NBLModifier``, ``quantize``: whether GPTQ follows, ``output``, and ``sabotage``, what
goes wrong in the last process: it sees a ``nan``, has no solution for a layer that it
owns (``solve``), or dies (``crash``). With ``same`` all processes have the same data.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# As conftest.py, which does not run here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

from nbl_modifier import NBLModifier
from nbl_modifier.layer_statistics.moments import LayerStatistics
from tests.tiny_llama import FOUR_BITS, compress, token_rows
from tests.work import WindowCounter


def sabotage(kind: str | None) -> None:
    """Make the last process fail in one of the ways it can."""
    if kind is None or dist.get_rank() < dist.get_world_size() - 1:
        return
    update = LayerStatistics.update

    def broken_update(self: LayerStatistics, *args: Any) -> None:
        residual, normalized, output, valid = args
        if kind == "crash" and self.name.endswith("layers.1.self_attn"):
            os._exit(7)
        if kind == "nan" and self.name.endswith("layers.2.self_attn"):
            output = output * torch.nan
        update(self, residual, normalized, output, valid)

    def broken_finalize(self: LayerStatistics) -> Any:
        raise ValueError("no solution today")

    patched: Any = LayerStatistics
    patched.update = broken_update
    if kind == "solve":
        patched.finalize = broken_finalize


def main() -> None:
    """Calibrate on this process's part of the rows, save in the first."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"])
    )
    sabotage(job["sabotage"])
    rows = token_rows(16)
    if job["sabotage"] != "same":
        rows = rows.shard(size, rank)
    recipe: list[Any] = [NBLModifier(**job["recipe"])]
    if job["quantize"]:
        recipe.append(GPTQModifier(config_groups=FOUR_BITS, ignore=["lm_head"]))
    counter = WindowCounter(model)
    compress(model, recipe, rows, output_dir=job["output"])
    report = recipe[0].report
    assert report is not None
    maps = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "self_attn.linear" in name
    }
    progress = recipe[0]._progress
    answer = {
        "report": json.loads(report.to_json()),
        "maps": maps,
        "windows": counter.windows,
        "passes": progress.passes,
        "stated": progress.cost.passes,
    }
    torch.save(answer, f"{job['output']}.rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
