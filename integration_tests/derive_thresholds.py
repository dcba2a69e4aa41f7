"""
How much recoveries vary with the calibration text, and thresholds that follow from it.

Compresses and evaluates every row of ``lm_eval/``, and every one of ``configs/`` that
expects a recovery, with different calibration text, seed by seed, and takes as
threshold the recovery that one more draw would fall below once in a thousand, were
recoveries normal: mean - t * sd * sqrt(1 + 1 / n), t being Student's with n - 1 degrees
of freedom at 0.999. Writes the thresholds into the rows::

    NBL_SERVE_PYTHON=.venv/serve/bin/python \\
        .venv/compress/bin/python -m integration_tests.derive_thresholds

The tests use seed 0, which is none of these.
"""

import argparse
import hashlib
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student_t

from integration_tests import materials
from integration_tests.lm_eval_rows import (
    DERIVED,
    ROWS,
    LmEvalRow,
    compress,
    evaluate,
    lm_eval_rows,
    recoveries,
)
from integration_tests.materials import heldout_nll, trained_model
from integration_tests.rows import CONFIGS, Row, rows
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.records.files import write_atomically

ONCE_IN = 1000

Recoveries = dict[str, dict[str, float]]


def threshold(values: Sequence[float]) -> float:
    """
    Return what one more value would fall below once in a thousand, rounded down.

    :param values: recoveries, one per seed, taken as normal
    """
    n = len(values)
    quantile = float(student_t.ppf(1 - 1 / ONCE_IN, n - 1))
    spread = statistics.stdev(values) * math.sqrt(1 + 1 / n)
    return math.floor((statistics.mean(values) - quantile * spread) * 1000) / 1000


def measure(row: LmEvalRow, seeds: Sequence[int], folder: Path) -> list[Recoveries]:
    """Return one set of recoveries per seed; checkpoints in ``folder`` are reused."""
    found = []
    recipe = hashlib.sha256(row.recipe_text.encode()).hexdigest()
    for seed in seeds:
        checkpoint = folder / f"{recipe}-{seed}"
        if not checkpoint.exists():
            compress(row, checkpoint, seed)
        found.append(recoveries(row, evaluate(row, checkpoint, folder)))
        print(f"{row.name}, seed {seed}: {found[-1]}", flush=True)
    return found


def measure_config(row: Row, seeds: Sequence[int], folder: Path) -> list[float]:
    """Return one recovery of held-out bits per byte per seed."""
    source = trained_model(row.model)
    base = heldout_nll(row.model, source)
    found = []
    for seed in seeds:
        directory = folder / f"{row.name}-{seed}"
        materials.compress(row.model, source, row.recipe_text, directory, seed)
        found.append(base / heldout_nll(row.model, directory))
        shutil.rmtree(directory)
        print(f"{row.name}, seed {seed}: {found[-1]}", flush=True)
    return found


def config_text(found: Sequence[float], seeds: Sequence[int]) -> str:
    """Return the part of a row of ``configs/`` that this script writes."""
    return (
        f"{DERIVED}\n# seeds {seeds[0]} to {seeds[-1]}, mean and sd of recovery\n"
        f"  recovery: {threshold(found)}  # {_mean_and_sd(found)}\n"
    )


def _mean_and_sd(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f}, {statistics.stdev(values):.4f}"


def derived_text(found: Sequence[Recoveries], seeds: Sequence[int]) -> str:
    """Return the part of a row that this script writes, as YAML with comments."""
    lines = [DERIVED, f"# seeds {seeds[0]} to {seeds[-1]}, mean and sd of recovery"]
    lines.append("  recovery_threshold:")
    for task, metrics in found[0].items():
        lines.append(f"    {task}:")
        for metric in metrics:
            values = [each[task][metric] for each in found]
            measured = _mean_and_sd(values)
            lines.append(f"      {metric}: {threshold(values)}  # {measured}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--rows", nargs="*", help="names (default: all)")
    args = parser.parse_args()
    show_ours_and_warnings()
    seeds = range(1, args.seeds + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in lm_eval_rows():
            if not args.rows or row.name in args.rows:
                text = derived_text(measure(row, seeds, folder), seeds)
                write(ROWS / f"{row.name}.yaml", text)
        for (config,) in (parameters.values for parameters in rows("recovery")):
            if not args.rows or config.name in args.rows:
                text = config_text(measure_config(config, seeds, folder), seeds)
                write(CONFIGS / f"{config.name}.yaml", text)
    return 0


def write(path: Path, text: str) -> None:
    """Put the derived part of a row into its file, and print it."""
    kept = path.read_text(encoding="utf-8").partition(DERIVED)[0]
    write_atomically(path, kept + text)
    print(f"{path.stem}\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
