# SPDX-License-Identifier: Apache-2.0
"""
What docs/upstream.md says of llm-compressor still holds.

A failure is good news: remove the workaround that the page names, and the row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "upstream").glob("*.py"))
PAGE = (ROOT / "docs" / "upstream.md").read_text("utf-8")


# Most of a script's time is the import of llm-compressor, so one process runs all. The
# one that imports our modifier, whose remedies must not be there yet, comes last.
IN_TURN = """
import contextlib, io, json, runpy, sys
found = {}
for path in sorted(sys.argv[1:], key=lambda path: path.endswith("entry_point.py")):
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        found[path.rpartition("/")[2]] = (end.code, output.getvalue())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, tuple[int, str]]:
    """Return exit code and output of each script."""
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, *map(str, SCRIPTS)],
        env=os.environ | {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_it_is_still_wrong(printed: dict[str, tuple[int, str]], script: str) -> None:
    returncode, output = printed[script]
    assert returncode == 0, f"{script} no longer shows what it was made for:\n{output}"
    (quoted,) = re.findall(
        rf"^\$ python examples/upstream/{script}\n(.+?)(?:\n\n|\n```)",
        PAGE,
        re.MULTILINE | re.DOTALL,
    )
    assert output.strip() == quoted


def test_page_lists_every_script() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", PAGE, re.MULTILINE)
    assert sorted(listed) == [path.name for path in SCRIPTS]
