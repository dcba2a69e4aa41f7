# SPDX-License-Identifier: Apache-2.0
"""
Which criterion, which selection and which fit keep most of a model's quality?

Measures held-out perplexity of the methods that have a name over numbers of replaced
layers and seeds of the calibration text; with the most layers, also of each combination
of criterion, selection, refit and input; and of the paper's and the best settings over
ranks, dampening and sizes of the calibration set::

    python benchmarks/selection_study.py examples/models/pycode-4m

Prints Markdown tables, means and standard errors over seeds, and writes every
measurement to a JSON file. An interrupted study that is started again continues.
Statistics, losses and fits are shared between settings that need the same ones.

``--criteria`` compares the criteria alone, each ranking once; with ``--calibration``
and ``--text`` on files instead of Python's own documentation::

    python benchmarks/selection_study.py SmolLM2-135M-Instruct --criteria --m 4,8,12 \\
        --calibration c4=c4_demo.json --text wikitext2=wikitext2_test.txt \\
        --num-windows 64 --seq-length 512 --test-windows 24
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from loguru import logger
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.layers import MeasuredLayers
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.criteria import CRITERIA, TRIED
from nbl_modifier.evaluation import PerplexityResult
from nbl_modifier.evaluation.texts import pack, stdlib_texts
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.layer_statistics.windows import Windows, held_out_batches
from nbl_modifier.replacement.surgery import Replacement
from nbl_modifier.search.budget import Budget
from nbl_modifier.search.choose import choose
from nbl_modifier.search.distillation import Distillation
from nbl_modifier.search.trials import Trials

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.paper_texts import load_windows, named_source


@dataclass(frozen=True)
class Setting:
    """
    One way to choose layers and to replace them: fields as of NBLModifier.

    :param criterion: what layers are ranked by
    :param selection: ``one_shot`` or ``greedy``
    :param refit: whether the chosen layers are fitted again
    :param input: what the maps read
    :param kind: ``attention`` or ``block``
    :param method: ``linear`` or ``drop``
    :param rank: of the maps; None: full
    :param dampening_frac: of C_xx
    :param epochs: how often the maps are trained over the windows
    """

    criterion: str = "cca_bound"
    selection: str = "one_shot"
    refit: bool = False
    input: Literal["residual", "normalized"] = "residual"
    kind: Literal["attention", "block"] = "attention"
    method: Literal["linear", "drop"] = "linear"
    rank: int | None = None
    dampening_frac: float = 0.0
    epochs: int = 0

    @property
    def spec(self) -> LinearizedLayer:
        """What is done to each chosen layer."""
        return LinearizedLayer(self.input, self.kind, self.method, self.rank)

    @property
    def ranking(self) -> Setting:
        """What decides about the layers: maps of full rank, whatever they end up as."""
        return replace(self, refit=False, rank=None, epochs=0)

    @property
    def fit(self) -> Setting:
        """What decides about the maps of given layers."""
        if self.refit or self.method == "drop" or self.selection == "one_shot":
            return replace(self, criterion="", selection="one_shot")
        return self


PAPER = Setting()
CLOSED_FORM = Setting("loss", "greedy", True, "normalized")
BEST = replace(CLOSED_FORM, epochs=4)
DISTILLED_PAPER = replace(PAPER, epochs=4)
DAMPENING = (0.01, 0.05, 0.2)
VARIANTS = {"paper": PAPER, "closed form": CLOSED_FORM, "best": BEST}
NAMED = {
    "paper": PAPER,
    "preset best": BEST,
    "preset best, in closed form": CLOSED_FORM,
    "attention DROP": Setting("cosine", method="drop"),
    "block NBL": Setting(kind="block"),
    "block DROP": Setting("cosine", kind="block", method="drop"),
    "SLEB": Setting("loss", "greedy", kind="block", method="drop"),
}


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
    :param text: of the test windows; empty: Python's own documentation
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
    text: str = ""


class Case:
    """
    A model with one calibration set, and everything that settings share.

    :param path: the model's folder
    :param seed: of the calibration text
    :param num_windows: calibration windows
    :param args: sizes, from the command line
    :param rows: what was measured on the same before
    """

    def __init__(
        self,
        path: str,
        seed: int,
        num_windows: int,
        args: argparse.Namespace,
        rows: Iterable[Row] = (),
    ) -> None:
        self._known = {
            (row.setting.ranking, row.num_layers): row.layers for row in rows
        }
        self.name, self.seed, self.num_windows = Path(path).name, seed, num_windows
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto"
        ).eval()
        self._architecture = architecture_of(self._model.config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(path)

        def windows(rows: Dataset) -> Windows:
            # whole batches are held out: of few windows, make small ones
            size = max(1, min(args.batch_size, len(rows) // 4))
            tokens = torch.tensor(rows["input_ids"][:])
            return Windows([{"input_ids": batch} for batch in tokens.split(size)])

        calibration, tests = texts(seed, num_windows, tokenizer, args)
        self._windows = windows(calibration)
        self._held_out = held_out_batches(
            [batch["input_ids"].numel() for batch in self._windows.batches]
        )
        self._forward = PartialForward(self._model, self._architecture)
        self._trials = Trials(
            self._forward, self._architecture, self._windows.select(self._held_out)
        )
        self._tests = {
            text: Trials(self._forward, self._architecture, windows(rows))
            for text, rows in tests.items()
        }
        self.candidates = range(len(self._forward.layers))
        self.base = {text: test.loss() for text, test in self._tests.items()}
        self._calibrations: dict[object, Calibration] = {}
        self._orders: dict[Setting, list[int]] = {}
        self._greedy: dict[Setting, dict[int, Replacement]] = {}
        self._refits: dict[object, Mapping[int, Replacement]] = {}
        self._results: dict[object, dict[str, PerplexityResult]] = {}

    def measure(self, setting: Setting, num_layers: int) -> list[Row]:
        """Return the perplexity of each text with ``num_layers`` layers replaced."""
        known = self._known.get((setting.ranking, num_layers))
        if known is None or not setting.refit:
            known = tuple(self._path(setting.ranking, num_layers)[:num_layers])
        layers = frozenset(known)
        key = (setting.fit, layers)
        if key not in self._results:
            replacements = self._replacements(setting, layers)
            self._results[key] = {
                text: test.loss(replacements) for text, test in self._tests.items()
            }
        return [
            Row(
                self.name,
                self.seed,
                self.num_windows,
                setting,
                num_layers,
                tuple(sorted(layers)),
                result.perplexity,
                self.base[text].perplexity,
                result.relative_to(self.base[text])[1],
                text,
            )
            for text, result in self._results[key].items()
        ]

    def _replacements(
        self, setting: Setting, layers: frozenset[int]
    ) -> Mapping[int, Replacement]:
        if setting.epochs:
            start = self._replacements(replace(setting, epochs=0), layers)
            fitted_on = set(range(len(self._windows.batches))) - self._held_out
            distillation = Distillation(
                self._forward,
                self._architecture,
                self._windows.select(fitted_on),
                self._trials,
            )
            return distillation.run(start, setting.epochs, None)[0]
        if setting.refit:
            key = (setting.spec, setting.dampening_frac, layers)
            if key not in self._refits:
                passes = self._passes(setting)
                self._refits[key] = passes.refit(layers).replacements
            return self._refits[key]
        if setting.selection == "greedy":
            found = self._greedy[setting.ranking]
        else:
            found = self._calibration(setting).replacements
        return {index: found[index] for index in layers}

    def _path(self, setting: Setting, num_layers: int) -> list[int]:
        """Return layers in the order in which they are replaced."""
        if setting not in self._orders or len(self._orders[setting]) < num_layers:
            calibration = self._calibration(setting)
            trials = self._trials if setting.criterion in TRIED else None
            greedy = setting.selection == "greedy"
            passes = self._passes(setting) if greedy else None
            budget = Budget(num_layers, "")
            outcome = choose(calibration, setting.criterion, budget, trials, passes)
            self._orders[setting] = outcome.order
            if greedy:
                self._greedy[setting] = outcome.replacements
                self._orders[setting] = outcome.order[:num_layers]
        return self._orders[setting]

    def _calibration(self, setting: Setting) -> Calibration:
        key = (setting.spec, setting.dampening_frac)
        if key not in self._calibrations:
            passes = self._passes(setting)
            self._calibrations[key] = passes.estimate(self.candidates)
        return self._calibrations[key]

    def _passes(self, setting: Setting) -> Passes:
        def calibration(streams: Mapping[int, Tensor] | None) -> Calibration:
            layers = MeasuredLayers(
                dict(enumerate(self._forward.layers)),
                {i: self._architecture.attention_name(i) for i in self.candidates},
                self._architecture,
                setting.spec,
            )
            return Calibration(
                LayerSolver(layers=layers, dampening_frac=setting.dampening_frac),
                Leaderboard("cca_bound", len(self.candidates)),
                held_out=self._held_out,
                streams=streams,
            )

        return Passes(self._forward, self._architecture, self._windows, calibration)


def texts(
    seed: int,
    num_windows: int,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
) -> tuple[Dataset, dict[str, Dataset]]:
    """Return the windows to calibrate on, and those to measure on by text."""
    length, count = args.seq_length, args.test_windows
    if args.calibration is None:
        calibration = stdlib_texts("calibration", seed)
        return (
            pack(calibration, tokenizer, length, num_windows),
            {"": pack(stdlib_texts("heldout"), tokenizer, length, count)},
        )
    found = load_windows(
        args.calibration,
        args.text,
        tokenizer,
        samples=num_windows,
        heldout_windows=count,
        seq_len=length,
        seed=seed,
    )
    return found.calibration, found.heldout


def criteria_settings() -> list[Setting]:
    """Return the criteria, each ranking once, and what the paper compares with."""
    ranked = [Setting(criterion) for criterion in CRITERIA]
    return [*ranked, Setting("cosine", method="drop")]


def main_settings() -> list[Setting]:
    """Return criterion x selection x refit x input, where it may say something."""
    settings = []
    for refit in (False, True):
        settings += [Setting(criterion, refit=refit) for criterion in CRITERIA]
        settings += [Setting(c, "greedy", refit) for c in ("cca_bound", "loss", "kl")]
        settings += [
            Setting(criterion, refit=refit, input="normalized")
            for criterion in ("cca_bound", "residual_nmse", "kl")
        ]
        settings += [Setting(c, "greedy", refit, "normalized") for c in ("loss", "kl")]
    return [*settings, DISTILLED_PAPER, BEST]


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

    def add(self, rows: Iterable[Row]) -> None:
        """Keep measurements."""
        self.rows += rows
        entries = [asdict(row) for row in self.rows]
        self._path.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def mean_and_error(values: Sequence[float]) -> str:
    """Return mean and standard error over seeds as text."""
    if not values:
        return ""
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
        every = ("method", "selection", "refit", "epochs", "input")
        varied = [f for f in every if len({getattr(s, f) for s in settings}) > 1]
        fields = ["criterion", *varied]
        rows = []
        for setting in settings:
            cells = [self._ratios(setting, m) for m in layers]
            if any(cells):
                names = [str(getattr(setting, field)) for field in fields]
                rows.append([*names, *(mean_and_error(cell) for cell in cells)])
        return table([*fields, *(f"m = {m}" for m in layers)], rows)

    def named(self, layers: Sequence[int]) -> str:
        """Return the same of methods that have a name."""
        rows = [
            [name, *(mean_and_error(self._ratios(setting, m)) for m in layers)]
            for name, setting in NAMED.items()
        ]
        return table(["method", *(f"m = {m}" for m in layers)], rows)

    def recovered(self, layers: Sequence[int]) -> str:
        """Return how much of what the paper's settings lose other ones keep."""
        rows = []
        for name in ("preset best", "preset best, in closed form"):
            row = [name]
            for m in layers:
                paper, kept = self._ratios(PAPER, m), self._ratios(NAMED[name], m)
                # of as many seeds, unless the study is not at its end
                pairs = zip(paper, kept, strict=True) if len(paper) == len(kept) else ()
                row.append(mean_and_error([(p - k) / (p - 1) for p, k in pairs]))
            rows.append(row)
        return table(["part kept", *(f"m = {m}" for m in layers)], rows)

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
    parser.add_argument("--ranks", type=numbers, default=[16, 32, 64, 128])
    parser.add_argument("--test-windows", type=int, default=96)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    add = parser.add_argument
    add("--criteria", action="store_true", help="compare these alone")
    add("--calibration", type=named_source, metavar="NAME=FILE")
    add("--text", type=named_source, action="append", default=[], metavar="NAME=FILE")
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
        for setting, m in dict.fromkeys(wanted)
        if store.lacks((name, seed, num_windows), setting, m)
    ]
    if not missing:
        return
    rows = [
        row
        for row in store.rows
        if (row.model, row.seed, row.num_windows) == (name, seed, num_windows)
    ]
    case = Case(path, seed, num_windows, args, rows)
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
    ranked = [replace(s, rank=r) for s in VARIANTS.values() for r in args.ranks]
    damped = [replace(CLOSED_FORM, dampening_frac=frac) for frac in DAMPENING]
    for seed in args.seeds:
        for path in args.models:
            if args.criteria:
                wanted = [(each, m) for each in criteria_settings() for m in args.m]
                run_case(path, seed, args.num_windows, wanted, args, store)
                continue
            wanted = [(setting, m) for setting in NAMED.values() for m in args.m]
            wanted += [(setting, largest) for setting in (*settings, *ranked, *damped)]
            run_case(path, seed, args.num_windows, wanted, args, store)
            for size in args.sizes:
                every = [(setting, largest) for setting in VARIANTS.values()]
                run_case(path, seed, size, every, args, store)
    print_all = print_criteria if args.criteria else print_tables
    for path in args.models:
        print_all(Path(path).name, store, args)
    return 0


def print_criteria(name: str, store: Store, args: argparse.Namespace) -> None:
    """Print what layers chosen by each criterion cost one model, for each text."""
    settings = criteria_settings()
    for text in dict.fromkeys(row.text for row in store.rows if row.model == name):
        rows = [row for row in store.rows if (row.model, row.text) == (name, text)]
        about = f"{text or 'held-out text'}, seeds {args.seeds}"
        print(f"\n{name}, {about}: perplexity, times base\n")
        print(Tables(rows).main(settings, args.m))


def print_tables(name: str, store: Store, args: argparse.Namespace) -> None:
    """Print what was measured on one model."""
    rows = [row for row in store.rows if row.model == name]
    tables, settings, largest = Tables(rows), main_settings(), max(args.m)
    base = rows[0].base
    print(f"\n## {name}\n\nbase perplexity {base:.3f}, seeds {args.seeds}")
    print("\nperplexity, times base, mean and standard error over seeds\n")
    print(tables.named(args.m))
    print("part of the perplexity lost by the paper's settings that is kept\n")
    print(tables.recovered(args.m))
    print(tables.main(settings, [largest]))
    sizes = [*args.sizes, args.num_windows]
    print(
        tables.over(
            "calibration windows",
            {f"{n} {size}": (s, size) for n, s in VARIANTS.items() for size in sizes},
            largest,
        )
    )
    print(
        tables.over(
            "rank",
            {
                f"{n} {rank or 'full'}": (replace(s, rank=rank), None)
                for n, s in VARIANTS.items()
                for rank in [*args.ranks, None]
            },
            largest,
        )
    )
    fractions = sorted({*DAMPENING, CLOSED_FORM.dampening_frac})
    damped = {
        f"{f:g}": (replace(CLOSED_FORM, dampening_frac=f), None) for f in fractions
    }
    print(tables.over("closed form, dampening_frac", damped, largest))


if __name__ == "__main__":
    sys.exit(main())
