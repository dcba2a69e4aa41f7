# SPDX-License-Identifier: Apache-2.0
"""Worker processes: their answers, and what is said where there is none."""

import sys
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.cli import workers

STAND_IN = """
import os, sys
from nbl_modifier.cli.workers import answer_job

def main(job):
    print("loading", job["model"], flush=True)
    if job["dies"] == "before":
        os.abort()
    return {"doubled": 2 * job["number"]}

answer_job(main)
if "after" in sys.argv[1]:
    os.abort()
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of this project's protocol without an engine, which dies on demand."""
    package = tmp_path / "stand_in"
    package.mkdir()
    (package / "worker.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setattr(workers, "__package__", "stand_in")


def run(dies: str) -> dict[str, Any]:
    job = {"model": "tiny", "number": 21, "dies": dies}
    return workers.run_worker("worker", "tiny", job, debug=False)


@pytest.mark.parametrize("dies", ["never", "after"])
def test_answer_counts_however_the_process_ends(dies: str) -> None:
    assert run(dies) == {"doubled": 42}


def test_death_without_answer_shows_the_log() -> None:
    with pytest.raises(RuntimeError, match="model tiny: .*exit code -6") as error:
        run("before")
    assert "loading tiny" in str(error.value)
