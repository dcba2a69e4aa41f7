# SPDX-License-Identifier: Apache-2.0
"""The models of benchmarks/paper_table.py, and what is measured on each."""

from __future__ import annotations

import argparse
import functools
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from benchmarks.methods import (
    BASE,
    BEST,
    BLOCK_DROP,
    BLOCK_NBL,
    CHOSEN,
    DROP,
    PAPER,
    RECIPES,
    SLEB,
    SLICED,
    compress,
    layers_with_cache,
    load,
)
from benchmarks.paper_numbers import perplexity_fields
from benchmarks.paper_results import Cell, Clock, Results, Settings
from benchmarks.paper_tasks import paper_tasks
from benchmarks.paper_texts import digest, facts_completed, hashes, load_windows
from benchmarks.slicegpt import slice_model, widest_within
from nbl_modifier import NBLModifier
from nbl_modifier.evaluation import evaluate_model, load_tasks, perplexity
from nbl_modifier.evaluation.cache import fingerprint
from nbl_modifier.evaluation.harness import LoadedTask
from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
from nbl_modifier.records.speed import SPEED_FILE_NAME

METHODS = (PAPER, BEST, DROP, BLOCK_DROP, SLEB, BLOCK_NBL, SLICED)
# On the hub a group, of which each is given a share of the documents.
_MMLU_SUBJECTS = 57


class Run:
    """
    The models, one after the other, each with everything that is to be measured on it.

    :param args: the command line
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self._texts = load_windows(
            args.calibration,
            args.text,
            self._tokenizer,
            samples=args.samples,
            heldout_windows=args.heldout_windows,
            seq_len=args.seq_len,
            seed=args.seed,
        )
        self.results = Results(args.output)
        tasks = paper_tasks(args.data, args.output / "tasks", args.mmlu_shots)
        self._tasks = {name: tasks[name] for name in args.tasks}
        self._config = AutoConfig.from_pretrained(args.model)
        self.results.begin(self._settings())

    def cells(self) -> Iterator[Cell]:
        """Yield the models in an order in which a part of them is of use."""
        yield Cell(BASE, 0)
        for method in CHOSEN:
            if method in self._args.methods:
                # the others begin with its choices
                yield Cell(method, max(self._args.m))
        first = [method for method in METHODS[:3] if method in self._args.methods]
        rest = [method for method in METHODS[3:] if method in self._args.methods]
        for methods in (first, rest):
            for m in self._args.m:
                yield from (Cell(method, m) for method in methods)

    def measure(self, cell: Cell) -> None:
        """
        Do what is missing of a model.

        :param cell: the model
        """
        parts = self._parts(cell)
        missing = {p: f for p, f in parts.items() if self.results.read(cell, p) is None}
        if self.results.read(cell) is not None and not missing:
            return
        model = self._model(cell)
        if self.results.read(cell) is None:  # the base model
            self.results.write(cell, self._described(cell, model, []), Clock())
        for part, function in missing.items():
            clock = Clock()
            self.results.write(cell, function(model), clock, part)
            print(f"{cell.name}: {part}, {clock.seconds:,.0f} s", flush=True)
        if not self._args.keep_checkpoints:
            shutil.rmtree(self._checkpoint(cell), ignore_errors=True)

    def _settings(self) -> Settings:
        args = self._args
        local = Path(args.model).is_dir()
        return Settings(
            model=args.model,
            model_hash=fingerprint(args.model) if local else args.model,
            num_layers=int(self._config.num_hidden_layers),
            dtype=args.dtype,
            calibration=args.calibration[0],
            samples=args.samples,
            heldout_windows=args.heldout_windows,
            seq_len=args.seq_len,
            texts=hashes(self._texts.heldout),
            calibration_hash=digest(self._texts.calibration),
            tasks=args.tasks,
            tasks_limit=args.tasks_limit,
            mmlu_shots=args.mmlu_shots,
            seed=args.seed,
        )

    def _parts(self, cell: Cell) -> dict[str, Callable[[PreTrainedModel], Any]]:
        """Return what is to be measured, and by what."""
        args = self._args
        parts: dict[str, Callable[[PreTrainedModel], Any]] = {}
        if "perplexity" in args.parts:
            for name in self._texts.heldout:
                parts[f"perplexity-{name}"] = partial(self._perplexity, name)
        if "facts" in args.parts:
            parts["facts"] = lambda model: facts_completed(model, self._tokenizer)
        # a sliced model is in memory only
        timed = args.serve_python and cell.method not in (BASE, SLICED)
        if timed and "speed" in args.parts:
            parts["speed"] = lambda _: self._speed(cell)
        if "tasks" in args.parts:
            for name in self._tasks:
                parts[f"task-{name}"] = partial(self._task, name)
        return parts

    def _model(self, cell: Cell) -> PreTrainedModel:
        """Return the model, compressed if it is not there."""
        dtype = getattr(torch, self._args.dtype)
        if cell.method == BASE:
            return load(self._args.model, dtype)
        if cell.method == SLICED:
            return self._sliced(cell).to(dtype)
        checkpoint = self._checkpoint(cell)
        if not checkpoint.exists() or self.results.read(cell) is None:
            self._compress(cell, checkpoint)
        return load(checkpoint, dtype)

    def _checkpoint(self, cell: Cell) -> Path:
        return self.results.directory(cell) / "checkpoint"

    def _compress(self, cell: Cell, checkpoint: Path) -> None:
        clock = Clock()
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial_folder = checkpoint.with_name("checkpoint.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        compress(
            load(self._args.model, getattr(torch, self._args.dtype)),
            self._tokenizer,
            self._texts.calibration,
            NBLModifier(**self._recipe(cell)),
            partial_folder,
            self._args.output / "statistics",
            batch_size=self._args.batch_size,
            seed=self._args.seed,
        )
        partial_folder.rename(checkpoint)
        report = NBLReport.load(checkpoint / REPORT_FILE_NAME)
        order = [layer.index for layer in report.ranking if layer.selected]
        described = self._described(cell, load(checkpoint), order)
        self.results.write(cell, described, clock)
        layers = ", ".join(map(str, report.selected_layers))
        print(f"{cell.name}: layers {layers}, {clock.seconds:,.0f} s", flush=True)

    def _recipe(self, cell: Cell) -> dict[str, Any]:
        """Return the fields of NBLModifier."""
        recipe = {"num_layers": cell.m, **RECIPES[cell.method]}
        if cell.method not in CHOSEN:
            return recipe
        # A greedy search takes the same layers first however many it is to take, so
        # the longest one is enough.
        longest = self.results.read(Cell(cell.method, max(self._args.m)))
        if longest is None or cell.m >= longest["m"]:
            return recipe
        return CHOSEN[cell.method] | {"layers": longest["order"][: cell.m]}

    def _sliced(self, cell: Cell) -> PreTrainedModel:
        """Return SliceGPT's model with as many parameters as NBL's, or fewer."""
        clock = Clock()
        budgets = (self.results.read(Cell(method, cell.m)) for method in (BEST, PAPER))
        budget = next((each for each in budgets if each is not None), None)
        if budget is None:
            raise ValueError(
                f"{SLICED}: is given as many parameters as {BEST} at the same m, which "
                f"is not there for m = {cell.m}. Run that first."
            )
        model = load(self._args.model, torch.float32)
        width = widest_within(model, budget["num_parameters"])
        tokens = torch.tensor(self._texts.calibration["input_ids"][:])
        slice_model(model, tokens.split(self._args.batch_size), width)
        if self.results.read(cell) is None:
            described = self._described(cell, model, []) | {"width": width}
            self.results.write(cell, described, clock)
        return model

    def _described(
        self, cell: Cell, model: PreTrainedModel, layers: list[int]
    ) -> dict[str, Any]:
        kept = layers_with_cache(model.config)
        return {
            "method": cell.method,
            "m": cell.m,
            "recipe": self._recipe(cell) if cell.method in RECIPES else None,
            "layers": sorted(layers),
            "order": layers,
            "num_parameters": sum(weight.numel() for weight in model.parameters()),
            "kv_cache": kept / int(self._config.num_hidden_layers),
        }

    def _perplexity(self, text: str, model: PreTrainedModel) -> dict[str, Any]:
        windows = self._texts.heldout[text]
        return perplexity_fields(perplexity(model, windows, self._args.batch_size))

    def _task(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Return a task's scores under the name it has on the hub."""
        task, limit = self._tasks[name], self._args.tasks_limit
        loaded = self._loaded[name]
        if limit is not None and name == "mmlu" and self._args.data is None:
            limit = math.ceil(limit / _MMLU_SUBJECTS)
        scores = evaluate_model(
            model,
            self._tokenizer,
            [loaded],
            limit=limit,
            batch_size=self._args.batch_size,
        )
        shots = self._args.mmlu_shots if name == "mmlu" else task.num_fewshot
        return replace(
            scores[loaded.names[0]], task=name, num_fewshot=shots or 0
        ).to_fields()

    @functools.cached_property
    def _loaded(self) -> dict[str, LoadedTask]:
        # all at once: lm-eval reads its index of tasks each time
        loaded = load_tasks(list(self._tasks.values()))
        return dict(zip(self._tasks, loaded, strict=True))

    def _speed(self, cell: Cell) -> dict[str, Any]:
        """Run ``nbl benchmark`` where vLLM is; it writes its own file, too."""
        directory = self.results.directory(cell)
        command = [
            *(self._args.serve_python, "-m", "nbl_modifier.cli", "benchmark"),
            *(str(self._checkpoint(cell)), "--baseline", str(self._args.model)),
            *("--dtype", self._args.dtype, "--output", str(directory)),
            *shlex.split(self._args.speed_args),
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{shlex.join(command)}: ended with exit code {done.returncode}."
            )
        return {"file": SPEED_FILE_NAME}
