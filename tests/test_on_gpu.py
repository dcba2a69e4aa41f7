# SPDX-License-Identifier: Apache-2.0
"""benchmarks/on_gpu.py: all its parts on a CPU, that it goes on, and what it says."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.records.speed import SPEED_FILE_NAME, SpeedReport

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.begin]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kit() -> Iterator[Any]:
    """The script, which imports its neighbours by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("on_gpu")


@pytest.fixture(scope="module")
def results(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a dry run, vLLM's parts left out."""
    folder: Path = tmp_path_factory.mktemp("gpu")
    assert kit.main(["--dry-run", "--output", str(folder)]) == 0
    return folder


def read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text("utf-8"))
    return found


def test_every_script_ran_and_printed_its_table(kit: Any, results: Path) -> None:
    ran = {path.stem for path in results.glob("*.json")}
    scripts = {read(results, name)["command"][0] for name in ran}
    assert scripts == {
        part.command[0] for part in kit.PARTS if part.dry and not part.in_vllm
    }
    for name in ran:
        result = read(results, name)
        assert result["exit_code"] == 0, result["errors"]
        assert result["versions"]["torch"]
        assert result["device"]
    assert re.search(r"^\| 32 \| 0\.\d+", read(results, "covariance")["output"], re.M)
    assert "(b) NBL calibration" in read(results, "calibration-8b")["output"]
    assert "of its" in read(results, "best-1b")["output"]
    assert read(results, "solver-4096")["output"].count("|") > 2 * 12
    (paper,) = read(results, "paper-m4")["speed"]
    assert {row["phase"] for row in paper["rows"]} == {"prefill", "decode"}


def test_page_has_every_row_with_its_command(kit: Any, results: Path) -> None:
    page = (results / "tables.md").read_text("utf-8")
    for part in kit.PARTS:
        assert f"### {part.row}\n\n```bash\n{kit.shown(part)}\n```\n" in page
    assert "not run: needs 2 GPUs" not in page  # a dry run says what a dry run lacks
    assert f"not run: {sys.executable} has no vllm" in page
    assert "![Figure 4: prefill against context](figure4.svg)" in page
    assert (results / "figure4.svg").read_text("utf-8").count("<path") > 4


def test_commands_are_for_the_shapes_of_the_paper(
    kit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kit.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 * len(kit.PARTS)
    for wanted in (
        "calibration.py --device {device} --quick --solver-d 0 --repeats 1 "
        "--hidden-size 4096 --intermediate-size 14336 --layers 32",
        "--samples 256 --length 2048",
        "solver.py --device {device} --d 16384",
        "--shape 8b --linearized 12 --repeats 2",
        "--scheme W4A16",
        "--draft-tokens 4 --accepted 3",
    ):
        assert wanted in printed
    for part in kit.PARTS:
        script = part.command[0]
        assert script == "-m" or (ROOT / script).exists()


def test_it_goes_on_with_what_is_missing(
    kit: Any, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(results, "solver-4096")
    (results / "solver-16384.json").unlink()
    arguments = ["--dry-run", "--only", "solver", "--output", str(results)]
    assert kit.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 1
    assert re.search(r"^    done after", printed, re.M)
    assert read(results, "solver-4096") == before
    assert read(results, "solver-16384")["exit_code"] == 0


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(
    kit: Any, tmp_path: Path
) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import subprocess, sys\n"
        "print('begun', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    part = kit.Part("slow", "table", "row", (str(script),))
    place = kit.Kit(tmp_path, sys.executable, "cpu", dry=False, limit=2.0)
    result = kit.run(place, part)  # returns only when the pipes of both are closed
    assert result["exit_code"] is None
    assert result["output"] == "begun"
    assert not kit.is_done(place, part)
    assert "not done in 2 s" in kit.tables(place, [part])


def test_a_part_that_fails_says_why(kit: Any, tmp_path: Path) -> None:
    part = kit.Part("bad", "table", "row", ("benchmarks/solver.py", "--d", "x"))
    place = kit.Kit(tmp_path, sys.executable, "cpu", dry=False, limit=60.0)
    assert kit.run(place, part)["exit_code"] == 1
    page = kit.tables(place, [part])
    assert "failed with exit code 1" in page
    assert "invalid literal for int()" in page


def test_speeds_are_kept_as_they_were_written(results: Path) -> None:
    (path,) = (results / "paper-m4").rglob(SPEED_FILE_NAME)
    (kept,) = read(results, "paper-m4")["speed"]
    assert len(SpeedReport.load(path).rows) == len(kept["rows"])
