# SPDX-License-Identifier: Apache-2.0
"""What is too long to be read at once is cut, in the package and in the scripts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("nbl_modifier", "benchmarks", "docs", "examples")
FILES = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
MOST_LINES = 350
MOST_LINES_OF_A_FUNCTION = 60


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and lines of each function, its docstring included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_files() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines())
        for path in FILES
    }
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines, cut them by subject: {long}"


def test_functions() -> None:
    long = {
        f"{path.relative_to(ROOT).as_posix()}:{name}": count
        for path in FILES
        for name, count in functions(path)
        if count > MOST_LINES_OF_A_FUNCTION
    }
    assert not long, f"more than {MOST_LINES_OF_A_FUNCTION} lines, cut them: {long}"
