# SPDX-License-Identifier: Apache-2.0
"""
Distributed calibrations for ``test_processes.py``: python distributed_run.py SECONDS

For each ``JOB.json`` named on standard input it starts what torchrun starts, an agent
and two processes that this one has imported everything for: that takes ten times what a
job does. The answer is a line of JSON: ``returncode`` and ``stderr``.

``JOB.json``: ``model`` and ``dtype`` to load it in, ``recipe``: fields of
``NBLModifier``, ``quantize``: whether GPTQ follows, ``output``, and ``sabotage``, what
goes wrong in the last process: it sees a ``nan``, has no solution for a layer that it
owns (``solve``), or dies (``crash``). With ``same`` all processes have the same data.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
import uuid
from pathlib import Path
from typing import Any

# As conftest.py, which does not run here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
from llmcompressor.modifiers.quantization import GPTQModifier
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
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


def calibrate(path: str) -> None:
    """Calibrate on this process's part of the rows, save in the first."""
    job = json.loads(Path(path).read_text())
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
    progress = recipe[0]._run.progress
    answer = {
        "report": json.loads(report.to_json()),
        "maps": maps,
        "windows": counter.windows,
        "passes": progress.passes,
        "stated": progress.cost.passes,
    }
    torch.save(answer, f"{job['output']}.rank{rank}.pt")
    dist.destroy_process_group()


def shown(path: str) -> None:
    """Calibrate; show an error where a script shows it."""
    try:
        calibrate(path)
    except BaseException:
        traceback.print_exc()
        raise


def launch(path: str) -> None:
    """Be torchrun --standalone --nproc-per-node 2."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, shown)(path)


def run(path: str, seconds: int) -> dict[str, Any]:
    """Return how a job ends, by a signal if it takes too long."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            os.dup2(errors.fileno(), sys.stderr.fileno())
            try:
                launch(path)
            except ChildFailedError:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return {"returncode": code, "stderr": errors.read()}


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is logged is no answer
    for line in sys.stdin:
        print(json.dumps(run(line.strip(), int(sys.argv[1]))), file=answers, flush=True)
