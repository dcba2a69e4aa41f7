# SPDX-License-Identifier: Apache-2.0
"""The files of benchmarks/paper_table.py."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import BASE, slug
from nbl_modifier.records.files import write_atomically
from nbl_modifier.records.provenance import collect_versions, utc_timestamp

_SETTINGS_FILE_NAME = "settings.json"
_CELL = "cell"


@dataclass(frozen=True)
class Settings:
    """
    Everything that numbers of one table have in common.

    :param model: as it is called
    :param model_hash: of its files; the name again for one on the hub
    :param num_layers: its decoder layers
    :param dtype: of weights and arithmetic
    :param calibration: name of the text
    :param samples: calibration windows
    :param heldout_windows: of each text, at most
    :param seq_len: tokens per window
    :param texts: hash of the held-out windows by text
    :param calibration_hash: of the calibration windows
    :param tasks: lm-eval's, in order
    :param tasks_limit: documents of each; None for all
    :param mmlu_shots: examples in MMLU's prompts
    :param seed: of what is random
    """

    model: str
    model_hash: str
    num_layers: int
    dtype: str
    calibration: str
    samples: int
    heldout_windows: int
    seq_len: int
    texts: dict[str, str]
    calibration_hash: str
    tasks: list[str]
    tasks_limit: int | None
    mmlu_shots: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """
    One model of the table.

    :param method: its name
    :param m: layers, or blocks, to replace; 0 for the base model
    """

    method: str
    m: int

    @property
    def name(self) -> str:
        """Of the cell's folder."""
        return BASE if self.method == BASE else f"{slug(self.method)}-m{self.m}"


class Clock:
    """Counts from now on: a busy machine's time says little without the processor's."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._cpu_start = time.process_time()

    @property
    def seconds(self) -> float:
        """Time since, in seconds."""
        return time.perf_counter() - self._start

    @property
    def cpu_seconds(self) -> float:
        """Processor time of this process since, all its threads together."""
        return time.process_time() - self._cpu_start


class Results:
    """
    A folder of results.

    :param folder: made if it is not there
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, settings: Settings) -> None:
        """
        Write down the settings, or compare them with those of what is there.

        :param settings: of this run
        :raises ValueError: if they differ; the message says in what
        """
        path = self.folder / _SETTINGS_FILE_NAME
        if path.exists():
            before, now = asdict(self.settings()), asdict(settings)
            changed = [
                f"{name} was {before[name]!r} and is {now[name]!r}"
                for name in now
                if name != "model" and before[name] != now[name]
            ]
            if changed:
                raise ValueError(
                    f"--output {self.folder}: holds results of other settings: "
                    f"{'; '.join(changed)}. Give the settings of before, or another "
                    "folder."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(settings), indent=1) + "\n")

    def settings(self) -> Settings:
        """
        Return the settings of what is there.

        :raises FileNotFoundError: if there is nothing
        """
        path = self.folder / _SETTINGS_FILE_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"--output {self.folder}: holds no results, it has no "
                f"{_SETTINGS_FILE_NAME}. Run without --render first."
            )
        return Settings(**json.loads(path.read_text(encoding="utf-8")))

    def directory(self, cell: Cell) -> Path:
        """Return the folder of one model."""
        return self.folder / cell.name

    def read(self, cell: Cell, part: str = _CELL) -> Any:
        """Return what was written for a part, None if it is still to be measured."""
        path = self.directory(cell) / f"{part}.json"
        if not path.exists():
            return None
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def seconds(self, cell: Cell, part: str = _CELL) -> float:
        """Return what a part took that is there."""
        path = self.directory(cell) / f"{part}.json"
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])

    def write(self, cell: Cell, result: Any, clock: Clock, part: str = _CELL) -> None:
        """
        Keep a part with how it was made.

        :param cell: the model
        :param result: JSON types, finite
        :param clock: started when it was begun
        :param part: its name
        """
        self.directory(cell).mkdir(parents=True, exist_ok=True)
        content = {
            "result": result,
            "seconds": round(clock.seconds, 1),
            "cpu_seconds": round(clock.cpu_seconds, 1),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "versions": collect_versions(),
            "created": utc_timestamp(),
        }
        text = json.dumps(content, allow_nan=False)
        write_atomically(self.directory(cell) / f"{part}.json", text + "\n")

    def cells(self) -> list[Cell]:
        """Return the models that are there: base, then by method and m."""
        found = []
        for path in self.folder.glob(f"*/{_CELL}.json"):
            result = json.loads(path.read_text(encoding="utf-8"))["result"]
            found.append(Cell(result["method"], result["m"]))
        return sorted(found, key=lambda cell: (cell.m, cell.method))
