# SPDX-License-Identifier: Apache-2.0
"""
Kills a save at every file operation, and looks what the directories load as.

Run by test_checkpoint.py in a process of its own: python kill_save.py MODEL FOLDER
SCENARIO... Each save runs in a forked child that dies by os._exit(), without any
cleanup, right before its n-th file operation below FOLDER, for n = 1, 2, ... until it
finishes. Prints a JSON object, results by scenario: how often the target was ``old``,
``new``, or loaded as nothing, after the kills.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from loguru import logger
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.hf import directories as directories_that_change
from tests.tiny_llama import FOUR_BITS, Model, compress, load, logits_of, token_rows

OPERATIONS = {
    "open",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "ctypes.dlsym",  # right before the exchange of two directories
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
}
KILLED = 17
# transformers without nbl_modifier: prints for each path whether it loads.
STOCK = """
import sys
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    try:
        AutoModelForCausalLM.from_pretrained(line.strip(), trust_remote_code=False)
        print("loads", flush=True)
    except (OSError, ValueError, KeyError, RuntimeError):
        print("refused", flush=True)
"""


def make_model(folder: Path, scenario: str, layers: list[int]) -> Model:
    """Return a linearized model, quantized too in the scenario ``packed``."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    recipe: list[Any] = [NBLModifier(layers=layers)]
    if scenario == "packed":
        recipe.append(
            GPTQModifier(
                config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"]
            )
        )
    return compress(load(folder), recipe, token_rows())


def save_and_die(model: Model, target: Path, operation: int, **kwargs: Any) -> bool:
    """
    Save in a child that is killed before its ``operation``-th file operation.

    :return: whether it finished before
    """
    child = os.fork()
    if child == 0:
        watched, seen = str(target.parent), 0

        def kill(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            here = event == "ctypes.dlsym" or watched in str(args)
            if event in OPERATIONS and here:
                seen += 1
                if seen == operation:
                    os._exit(KILLED)

        sys.addaudithook(kill)
        try:
            model.save_pretrained(target, **kwargs)
        finally:
            os._exit(0 if sys.exception() is None else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, KILLED):
        raise RuntimeError(f"the save before operation {operation} failed: {code}")
    return code == 0


def directories(folder: Path) -> Iterator[Path]:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            yield path


def loaded_as(path: Path, known: dict[str, torch.Tensor]) -> str | None:
    """Return which of the ``known`` models ``path`` loads as, None if it does not."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError):
        return None
    logits = logits_of(model)
    for name, expected in known.items():
        if torch.equal(logits, expected):
            return name
    return "something else"


class Stock:
    """A process with transformers and without nbl_modifier."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", STOCK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def loads(self, path: Path) -> bool:
        """Return whether it loads ``path``."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        print(path, file=requests, flush=True)
        answer = answers.readline().strip()
        assert answer in ("loads", "refused"), answer
        return answer == "loads"

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def run(
    model_folder: Path, folder: Path, scenario: str, stock: Stock
) -> dict[str, Any]:
    """
    Return how many kills there were, and what was loaded after them.

    :param model_folder: the model to compress
    :param folder: where to work
    :param scenario: ``new``, ``packed`` (quantized, too), ``overwrite``, or ``inside``:
        the same where directories cannot be exchanged
    :param stock: what must never load anything
    """
    model = make_model(model_folder, scenario, layers=[0, 2])
    known = {"new": logits_of(model)}
    template = folder / "template"
    template.mkdir(parents=True)
    if scenario == "inside":
        directories_that_change._exchange = lambda *_: False
    overwrites = scenario in ("overwrite", "inside")
    old = make_model(model_folder, scenario, layers=[1])
    logits = logits_of(old)
    # Always: what the first save imports, each child would import again.
    old.save_pretrained(folder / "old", max_shard_size="20KB")
    if overwrites:
        known["old"] = logits
        (folder / "old").rename(template / "out")
        (template / "out" / "notes.txt").write_text("precious")
    options = {"max_shard_size": "60KB"} if overwrites else {}
    wrong: list[str] = []
    seen: Counter[str] = Counter()
    kills, finished = 0, False
    while not finished:
        parent = folder / f"kill-{kills + 1}"
        shutil.copytree(template, parent)
        target = parent / "out"
        finished = save_and_die(model, target, kills + 1, **options)
        kills += not finished
        for path in directories(parent):
            found = loaded_as(path, known)
            # A whole one may wait, hidden, for its turn.
            hidden = path.name.startswith(".")
            if found is not None and not (
                found in known and (path == target or hidden)
            ):
                wrong.append(f"{path} after {kills} operations: {found}")
            if stock.loads(path):
                wrong.append(f"{path} after {kills} operations: loads in transformers")
        directories_that_change.recover(target)  # as the next run does
        last = loaded_as(target, known) or "nothing"
        seen[last] += not finished
        if overwrites and (target / "notes.txt").read_text() != "precious":
            wrong.append(f"{target} after {kills} operations: notes.txt is gone")
        shutil.rmtree(parent)
    return {"kills": kills, "wrong": wrong, "seen": dict(seen), "finished": last}


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    logger.remove()
    logging.set_verbosity_error()
    nbl_modifier.hf.register()
    stock_transformers = Stock()
    assert stock_transformers.loads(Path(sys.argv[1]))  # it can say so
    results = {
        name: run(Path(sys.argv[1]), Path(sys.argv[2]) / name, name, stock_transformers)
        for name in sys.argv[3:]
    }
    stock_transformers.stop()
    print(json.dumps(results))  # noqa: T201  (to the test that started this)
