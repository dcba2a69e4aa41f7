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
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loguru import logger
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.paper_texts import named_source
from benchmarks.selection_case import Case
from benchmarks.selection_results import Store, Tables
from benchmarks.selection_settings import (
    CLOSED_FORM,
    DAMPENING,
    NAMED,
    VARIANTS,
    Setting,
    criteria_settings,
    main_settings,
)


def numbers(text: str) -> list[int]:
    """Return comma-separated integers."""
    return [int(part) for part in text.split(",") if part]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+")
    add("--m", type=numbers, default=[2, 4, 6, 8])
    add("--seeds", type=numbers, default=[0, 1, 2])
    add("--num-windows", type=int, default=256)
    add("--sizes", type=numbers, default=[16, 32, 64, 128], help="further set sizes")
    add("--ranks", type=numbers, default=[16, 32, 64, 128])
    add("--test-windows", type=int, default=96)
    add("--seq-length", type=int, default=256)
    add("--batch-size", type=int, default=8)
    add("--dtype", default="auto", help="of the model (its own)")
    add("--criteria", action="store_true", help="compare these alone")
    add("--calibration", type=named_source, metavar="NAME=FILE")
    add("--text", type=named_source, action="append", default=[], metavar="NAME=FILE")
    add("--json", type=Path, default=Path("selection_study.json"))
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
    which = (name, seed, num_windows)
    missing = [pair for pair in dict.fromkeys(wanted) if store.lacks(which, *pair)]
    if not missing:
        return
    case = Case(path, seed, num_windows, args, store.of(which))
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
