# SPDX-License-Identifier: Apache-2.0
"""
Kill a process 200 times while it saves a checkpoint, and look what is there.

    python benchmarks/kill_saves.py [--kills 200]

Half of the kills go into a directory that does not exist yet, half into one that holds
an earlier checkpoint. Each save runs in a forked child that SIGKILL ends at a random
moment of it. What is loaded from the directory afterwards is ``new``, ``old``,
``nothing`` (config.json is not there) or ``a mixture``. Exit code 1 if there is a
mixture, or nothing where there was an old one. The model is random and small, so that
most of a save is files, not tensors.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from loguru import logger
from transformers.utils import logging

import nbl_modifier.hf
from nbl_modifier.hf.directories import recover
from tests.hf.kill_save import loaded_as, make_model
from tests.tiny_llama import Model, logits_of, save_llama


def save_in_child(model: Model, target: Path, seconds: float | None) -> float:
    """
    Save in a child, which is killed after ``seconds`` unless it has finished.

    :return: how long it ran, in seconds
    """
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
        model.save_pretrained(target)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    logger.remove()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    nbl_modifier.hf.register()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_llama(folder / "base")
        new, old = (make_model(base, "", layers) for layers in ([0, 2], [1]))
        known = {"new": logits_of(new), "old": logits_of(old)}
        old.save_pretrained(folder / "old")
        counts = {"fresh": Counter[str](), "over an old one": Counter[str]()}
        lasting = max(save_in_child(new, folder / f"{i}", None) for i in range(3))
        for kill in range(args.kills):
            where = list(counts)[kill % 2]
            parent = folder / f"kill-{kill}"
            parent.mkdir()
            target = parent / "out"
            if where != "fresh":
                shutil.copytree(folder / "old", target)
            save_in_child(new, target, draw.uniform(0, lasting))
            recover(target)
            found = loaded_as(target, known)
            if found is None:
                loads = (target / "config.json").exists()
                found = "a mixture" if loads else "nothing"
            counts[where]["a mixture" if found == "something else" else found] += 1
            shutil.rmtree(parent)
    kinds = ("old", "new", "nothing", "a mixture")
    print(f"{args.kills} kills in {lasting * 1000:.0f} ms of a save")
    for where, found_there in counts.items():
        row = ", ".join(f"{kind} {found_there[kind]}" for kind in kinds)
        print(f"  {where:<15}  {row}")
    mixed = sum(each["a mixture"] for each in counts.values())
    return int(mixed > 0 or counts["over an old one"]["nothing"] > 0)


if __name__ == "__main__":
    sys.exit(main())
