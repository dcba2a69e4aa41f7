# SPDX-License-Identifier: Apache-2.0
"""
Size of statistics, and time to use them, beside the model that they are of.

    python benchmarks/statistics_files.py MODEL STATISTICS [STATISTICS ...]

Processor seconds of this process on one thread, files in the page cache: median
(lowest..highest) of the rounds, in which model and statistics take turns.

- load: of statistics read, checked against their digest and unpacked, all layers; of
  the model ``from_pretrained`` in its own dtype, and every weight read once
- solve: the map, the bound and the errors of every layer
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration.layers import MeasuredLayers
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.report.table import Table


class Statistics:
    """
    What one folder holds.

    :param model: that the statistics are of
    :param folder: of statistics, as NBLModifier wrote it
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.store = StatisticsStore.open(str(folder))
        architecture = architecture_of(model.config.model_type)
        origin: Any = self.store.origin  # whose words are checked by the layer's
        modules = decoder_layers(model, architecture)
        found = [index for index in range(len(modules)) if index in self.store]
        name = architecture.attention_name
        if origin.kind == "block":
            name = architecture.layer_name
        self.layers = MeasuredLayers(
            {index: modules[index] for index in found},
            {index: name(index) for index in found},
            architecture,
            LinearizedLayer(origin.input, origin.kind),
        )
        self.solver = LayerSolver(layers=self.layers, measure_held_out=False)

    def seconds(self) -> tuple[float, float]:
        """Load and solve layer by layer, as calibration does; return both times."""
        load = solve = 0.0
        for index, name in self.layers.names.items():
            started = time.process_time()
            moments = self.solver.divided(*self.store.load(index, name))
            loaded = time.process_time()
            self.solver.solve(index, *moments)
            load += loaded - started
            solve += time.process_time() - loaded
        return load, solve


def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")


def model_seconds(name: str) -> float:
    """Return the time to load a model, its weights read from the file."""
    started = time.process_time()
    model = load_model(name)
    for weight in model.parameters():
        weight.detach().clone()
    return time.process_time() - started


def spread(values: list[float]) -> str:
    """Return median, lowest and highest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f} ({low:.2f}..{high:.2f})"


def size(folder: Path) -> int:
    """Return the bytes of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def report(model_name: str, folders: list[Path], rounds: int) -> str:
    """
    Measure, and return the table in markdown.

    :param model_name: directory of the model
    :param folders: of statistics of it
    :param rounds: how often
    """
    model = load_model(model_name)
    measured = {folder: Statistics(model, folder) for folder in folders}
    turns: dict[Path, Callable[[], tuple[float, float]]]
    turns = {folder: each.seconds for folder, each in measured.items()}
    loads: dict[Path | str, list[float]] = {"model": [], **{f: [] for f in folders}}
    solves: dict[Path, list[float]] = {folder: [] for folder in folders}
    for _ in range(rounds):
        gc.collect()
        loads["model"].append(model_seconds(model_name))
        for folder, run in turns.items():
            load, solve = run()
            loads[folder].append(load)
            solves[folder].append(solve)
    weights = size(Path(model_name))
    dtype = str(model.dtype).removeprefix("torch.")
    rows = [
        (
            *(f"model, {dtype}", str(model.config.num_hidden_layers)),
            *(f"{weights / 1e6:.0f}", "1.00", spread(loads["model"]), ""),
        )
    ]
    for folder, each in measured.items():
        origin, total = each.store.origin, size(folder)
        cells = (
            f"statistics, {origin.kind}, input {origin.input}",
            str(len(each.layers.modules)),
            *(f"{total / 1e6:.0f}", f"{total / weights:.2f}"),
            *(spread(loads[folder]), spread(solves[folder])),
        )
        rows.append(cells)
    header = ("", "layers", "MB", "over the model", "load, s", "solve, s")
    return Table(header, rows).to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="directory of the model")
    parser.add_argument("statistics", nargs="+", type=Path, help="folders of its own")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print(report(args.model, args.statistics, args.rounds))


if __name__ == "__main__":
    main()
