# SPDX-License-Identifier: Apache-2.0
"""
Which criterion, which selection and which fit keep most of a model's quality?

Measures held-out perplexity for each combination of criterion, selection, refit and
input over numbers of replaced layers and seeds of the calibration text, and for the
paper's and the best settings also over ranks and sizes of the calibration set::

    python benchmarks/selection_study.py examples/models/pycode-4m

Prints Markdown tables, means and standard errors over seeds, and writes every
measurement to a JSON file. An interrupted study that is started again continues.
Statistics, losses and fits are shared between settings that need the same ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from llmcompressor.core import State
from loguru import logger
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration import Calibration
from nbl_modifier.data import pack, stdlib_texts
from nbl_modifier.evaluation import PerplexityResult
from nbl_modifier.forward import PartialForward
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.passes import Passes
from nbl_modifier.search import Search
from nbl_modifier.selection import Budget
from nbl_modifier.surgery import Replacement
from nbl_modifier.trials import Trials
from nbl_modifier.windows import Batch, Windows, held_out_batches

CRITERIA = ("cca_bound", "nmse", "residual_nmse", "cosine", "loss")


@dataclass(frozen=True)
class Setting:
    """
    One way to choose and fit layers; ``drop`` is attention without a map.

    :param criterion: what layers are ranked by
    :param selection: ``one_shot`` or ``greedy``
    :param fit: ``once``, ``refit`` or ``drop``
    :param input: what the maps read
    :param rank: of the maps; None: full
    """

    criterion: str = "cca_bound"
    selection: str = "one_shot"
    fit: str = "once"
    input: str = "residual"
    rank: int | None = None


PAPER = Setting()
BEST = Setting("loss", fit="refit", input="normalized")
DROP = Setting("cosine", fit="drop")


@dataclass(frozen=True)
class Row:
    """
    One measurement.

    :param model: name of the model's folder
    :param seed: of the calibration text
    :param num_windows: calibration windows, held-out ones included
    :param setting: how layers were chosen and fitted
    :param num_layers: how many
    :param layers: which
    :param perplexity: on the test windows
    :param base: of the model before, on the same
    :param error: standard error of their ratio over windows, compared in pairs
    """

    model: str
    seed: int
    num_windows: int
    setting: Setting
    num_layers: int
    layers: tuple[int, ...]
    perplexity: float
    base: float
    error: float


class Case:
    """
    A model with one calibration set, and everything that settings share.

    :param path: the model's folder
    :param seed: of the calibration text
    :param num_windows: calibration windows
    :param args: sizes, from the command line
    """

    def __init__(
        self, path: str, seed: int, num_windows: int, args: argparse.Namespace
    ) -> None:
        self.name, self.seed, self.num_windows = Path(path).name, seed, num_windows
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto"
        ).eval()
        self._architecture = architecture_of(self._model.config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(path)

        def batches(texts: Iterable[str], count: int) -> list[Batch]:
            rows = pack(texts, tokenizer, args.seq_length, count)["input_ids"]
            # whole batches are held out: of few windows, make small ones
            size = max(1, min(args.batch_size, count // 4))
            return [{"input_ids": batch} for batch in torch.tensor(rows).split(size)]

        self._windows = Windows(batches(stdlib_texts("calibration", seed), num_windows))
        test = Windows(batches(stdlib_texts("heldout"), args.test_windows))
        self._held_out = held_out_batches(
            [batch["input_ids"].numel() for batch in self._windows.batches]
        )
        self._forward = PartialForward(self._model, self._architecture)
        self._trials = Trials(
            self._forward, self._architecture, self._windows.select(self._held_out)
        )
        self._test = Trials(self._forward, self._architecture, test)
        self.candidates = range(len(self._forward.layers))
        self.base = self._test.loss()
        self._calibrations: dict[tuple[str, int | None], Calibration] = {}
        self._greedy: dict[tuple[str, str], list[tuple[int, Replacement]]] = {}
        self._orders: dict[tuple[str, str], list[int]] = {}
        self._refits: dict[object, Mapping[int, Replacement]] = {}
        self._results: dict[object, PerplexityResult] = {}

    def measure(self, setting: Setting, num_layers: int) -> Row:
        """Return the perplexity with ``num_layers`` layers replaced."""
        path = self._path(setting, num_layers)
        layers = frozenset(path[:num_layers])
        fitted_by = setting.criterion if setting.selection == "greedy" else None
        if setting.fit != "once":  # the way to the choice left no trace
            fitted_by = None
        key = (setting.fit, setting.input, setting.rank, fitted_by, layers)
        if key not in self._results:
            self._results[key] = self._test.loss(self._fit(setting, layers))
        result = self._results[key]
        _, error = result.relative_to(self.base)
        return Row(
            self.name,
            self.seed,
            self.num_windows,
            setting,
            num_layers,
            tuple(sorted(layers)),
            result.perplexity,
            self.base.perplexity,
            error,
        )

    def _fit(
        self, setting: Setting, layers: frozenset[int]
    ) -> Mapping[int, Replacement]:
        if setting.fit == "drop":
            return {i: Replacement(LinearizedLayer(method="drop")) for i in layers}
        if setting.fit == "refit":
            key = (setting.input, setting.rank, layers)
            if key not in self._refits:
                passes = self._passes(setting.input, setting.rank)
                self._refits[key] = passes.refit(layers).replacements
            return self._refits[key]
        if setting.selection == "greedy":
            steps = self._greedy[setting.criterion, setting.input]
            return {i: step for i, step in steps if i in layers}
        replacements = self._calibration(setting.input, setting.rank).replacements
        return {i: replacements[i] for i in layers}

    def _path(self, setting: Setting, num_layers: int) -> list[int]:
        """Return layers in the order in which they are replaced."""
        # Layers are chosen by maps of full rank, whatever the rank they end up with.
        key = (setting.criterion, setting.input)
        if setting.selection == "one_shot":
            if key not in self._orders:
                calibration = self._calibration(setting.input, None)
                search = self._search(setting.criterion, num_layers)
                self._orders[key] = search.one_shot(calibration).order
            return self._orders[key]
        if len(self._greedy.get(key, [])) < num_layers:
            calibration = self._calibration(setting.input, None)
            passes = self._passes(setting.input, None)
            search = self._search(setting.criterion, num_layers)
            outcome = search.greedy(calibration, passes)
            chosen = outcome.order[:num_layers]
            self._greedy[key] = [(i, outcome.replacements[i]) for i in chosen]
        return [index for index, _ in self._greedy[key]]

    def _search(self, criterion: str, num_layers: int) -> Search:
        trials = self._trials if criterion == "loss" else None
        return Search(criterion, Budget(num_layers, ""), trials)

    def _calibration(self, kind: str, rank: int | None) -> Calibration:
        if (kind, rank) not in self._calibrations:
            passes = self._passes(kind, rank)
            self._calibrations[kind, rank] = passes.estimate(self.candidates)
        return self._calibrations[kind, rank]

    def _passes(self, kind: str, rank: int | None) -> Passes:
        spec = LinearizedLayer(input=kind, rank=rank)  # type: ignore[arg-type]

        def calibration(streams: Mapping[int, Tensor] | None) -> Calibration:
            return Calibration(
                dict(enumerate(self._forward.layers)),
                {i: self._architecture.attention_name(i) for i in self.candidates},
                self._architecture,
                spec=spec,
                estimator="lmmse",
                dampening_frac=0.0,
                criterion="cca_bound",
                keep=len(self.candidates),
                held_out=self._held_out,
                streams=streams,
            )

        state = State(model=self._model)
        return Passes(
            state, self._forward, self._architecture, self._windows, calibration
        )


FITS = ("once", "refit")


def main_settings() -> list[Setting]:
    """Return criterion x selection x fit x input, where it may say something."""
    settings = [DROP]
    for criterion in CRITERIA:
        settings += [Setting(criterion, fit=fit) for fit in FITS]
    for criterion in ("cca_bound", "loss"):
        settings += [Setting(criterion, "greedy", fit) for fit in FITS]
    for criterion in ("cca_bound", "residual_nmse", "loss"):
        settings += [Setting(criterion, fit=f, input="normalized") for f in FITS]
    return settings


class Store:
    """The measurements so far, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            for entry in json.loads(path.read_text(encoding="utf-8")):
                entry["setting"] = Setting(**entry["setting"])
                entry["layers"] = tuple(entry["layers"])
                self.rows.append(Row(**entry))

    def lacks(self, case: tuple[str, int, int], setting: Setting, m: int) -> bool:
        """Return whether a measurement is still to be made."""
        return not any(
            (row.model, row.seed, row.num_windows) == case
            and (row.setting, row.num_layers) == (setting, m)
            for row in self.rows
        )

    def add(self, row: Row) -> None:
        """Keep a measurement."""
        self.rows.append(row)
        entries = [asdict(row) for row in self.rows]
        self._path.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def mean_and_error(values: Sequence[float]) -> str:
    """Return mean and standard error over seeds as text."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, texts left and numbers right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


class Tables:
    """
    The study as Markdown.

    :param rows: of one model
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._usual = max((row.num_windows for row in rows), default=0)

    def _ratios(
        self, setting: Setting, m: int, num_windows: int | None = None
    ) -> list[float]:
        """Return perplexity over the base model's, one for each seed, in order."""
        windows = num_windows or self._usual
        found = [
            (row.seed, row.perplexity / row.base)
            for row in self._rows
            if (row.setting, row.num_layers, row.num_windows) == (setting, m, windows)
        ]
        return [ratio for _, ratio in sorted(found)]

    def main(self, settings: Sequence[Setting], layers: Sequence[int]) -> str:
        """Return perplexity over the base model's by setting and number of layers."""
        header = [
            "criterion",
            "selection",
            "fit",
            "input",
            *(f"m = {m}" for m in layers),
        ]
        rows = []
        for setting in settings:
            cells = [self._ratios(setting, m) for m in layers]
            if any(cells):
                names = asdict(setting)
                rows.append(
                    [str(names[n]) for n in ("criterion", "selection", "fit", "input")]
                    + [mean_and_error(cell) if cell else "" for cell in cells]
                )
        return table(header, rows)

    def recovered(self, settings: Sequence[Setting], layers: Sequence[int]) -> str:
        """Return what part of the perplexity that the paper's method loses is kept."""
        header = [
            "criterion",
            "selection",
            "fit",
            "input",
            *(f"m = {m}" for m in layers),
        ]
        rows = []
        for setting in settings:
            row = [setting.criterion, setting.selection, setting.fit, setting.input]
            for m in layers:
                pairs = zip(
                    self._ratios(PAPER, m), self._ratios(setting, m), strict=False
                )
                parts = [(paper - ours) / (paper - 1) for paper, ours in pairs]
                row.append(mean_and_error(parts) if parts else "")
            if any(row[4:]):
                rows.append(row)
        return table(header, rows)

    def over(
        self, name: str, values: Mapping[str, tuple[Setting, int | None]], m: int
    ) -> str:
        """Return the perplexity ratios of named variants at ``m`` layers."""
        rows = []
        for label, (setting, windows) in values.items():
            ratios = self._ratios(setting, m, windows)
            if ratios:
                rows.append([label, mean_and_error(ratios)])
        return table([name, f"m = {m}"], rows)


def numbers(text: str) -> list[int]:
    """Return comma-separated integers."""
    return [int(part) for part in text.split(",") if part]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--m", type=numbers, default=[2, 4, 6, 8])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--num-windows", type=int, default=256)
    parser.add_argument(
        "--sizes", type=numbers, default=[16, 32, 64, 128], help="further set sizes"
    )
    parser.add_argument("--ranks", type=numbers, default=[16, 32, 64])
    parser.add_argument("--test-windows", type=int, default=96)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("selection_study.json"))
    return parser.parse_args()


def run_case(
    path: str,
    seed: int,
    num_windows: int,
    wanted: Sequence[tuple[Setting, int]],
    args: argparse.Namespace,
    store: Store,
) -> None:
    """Make the measurements of one model and calibration set that are still missing."""
    name = Path(path).name
    missing = [
        (setting, m)
        for setting, m in wanted
        if store.lacks((name, seed, num_windows), setting, m)
    ]
    if not missing:
        return
    case = Case(path, seed, num_windows, args)
    label = f"{name}, seed {seed}, {num_windows} windows"
    # the longest greedy path first: the shorter ones are part of it
    for setting, m in tqdm(sorted(missing, key=lambda pair: -pair[1]), label):
        store.add(case.measure(setting, m))


def main() -> int:
    """Measure and print."""
    args = parse_arguments()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")  # not what is measured of each layer
    store = Store(args.json)
    largest = max(args.m)
    settings = main_settings()
    ranked = [
        Setting(s.criterion, s.selection, s.fit, s.input, rank)
        for s in (PAPER, BEST)
        for rank in args.ranks
    ]
    for seed in args.seeds:
        for path in args.models:
            wanted = [(setting, m) for setting in settings for m in args.m]
            wanted += [(setting, largest) for setting in ranked]
            run_case(path, seed, args.num_windows, wanted, args, store)
            for size in args.sizes:
                both = [(PAPER, largest), (BEST, largest)]
                run_case(path, seed, size, both, args, store)
    for path in args.models:
        print_tables(Path(path).name, store, args)
    return 0


def print_tables(name: str, store: Store, args: argparse.Namespace) -> None:
    """Print what was measured on one model."""
    rows = [row for row in store.rows if row.model == name]
    tables, settings, largest = Tables(rows), main_settings(), max(args.m)
    base = rows[0].base
    print(f"\n## {name}\n\nbase perplexity {base:.3f}, seeds {args.seeds}")
    print("\nperplexity, times base\n")
    print(tables.main(settings, args.m))
    print("part of the perplexity lost by the paper's settings that is not lost\n")
    print(tables.recovered(settings, args.m))
    sizes = [*args.sizes, args.num_windows]
    variants = {"paper": PAPER, "best": BEST}
    print(
        tables.over(
            "calibration windows",
            {f"{n} {size}": (s, size) for n, s in variants.items() for size in sizes},
            largest,
        )
    )
    print(
        tables.over(
            "rank",
            {
                f"{n} {rank or 'full'}": (
                    Setting(s.criterion, s.selection, s.fit, s.input, rank),
                    None,
                )
                for n, s in variants.items()
                for rank in [*args.ranks, None]
            },
            largest,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
