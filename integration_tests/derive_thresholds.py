"""
How much recoveries vary with the calibration text, and thresholds that follow from it.

Compresses and evaluates every row of ``lm_eval/`` with different calibration text, seed
by seed, and takes as threshold the recovery that one more draw would fall below once in
a thousand, were recoveries normal: mean - t * sd * sqrt(1 + 1 / n), t being Student's
with n - 1 degrees of freedom at 0.999. Writes the thresholds into the rows::

    NBL_SERVE_PYTHON=.venv/serve/bin/python \\
        .venv/compress/bin/python -m integration_tests.derive_thresholds

The tests use seed 0, which is none of these.
"""

import argparse
import hashlib
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student_t

from integration_tests.lm_eval_rows import (
    DERIVED,
    ROWS,
    LmEvalRow,
    compress,
    evaluate,
    lm_eval_rows,
    recoveries,
)
from nbl_modifier.cli.logs import show_ours_and_warnings
from nbl_modifier.report.schema import write_atomically

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


def derived_text(found: Sequence[Recoveries], seeds: Sequence[int]) -> str:
    """Return the part of a row that this script writes, as YAML with comments."""
    lines = [DERIVED, f"# seeds {seeds[0]} to {seeds[-1]}, mean and sd of recovery"]
    lines.append("  recovery_threshold:")
    for task, metrics in found[0].items():
        lines.append(f"    {task}:")
        for metric in metrics:
            values = [each[task][metric] for each in found]
            measured = f"{statistics.mean(values):.4f}, {statistics.stdev(values):.4f}"
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
        for row in lm_eval_rows():
            if args.rows and row.name not in args.rows:
                continue
            text = derived_text(measure(row, seeds, Path(name)), seeds)
            path = ROWS / f"{row.name}.yaml"
            kept = path.read_text(encoding="utf-8").partition(DERIVED)[0]
            write_atomically(path, kept + text)
            print(f"{row.name}\n{text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
