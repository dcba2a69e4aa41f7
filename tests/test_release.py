# SPDX-License-Identifier: Apache-2.0
"""What a release consists of, built and installed without a network."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.distributions import ROOT, Distributions, build
from tests.test_packaging import PROJECT

VERSION = PROJECT["version"]
PACKAGE = ROOT / "nbl_modifier"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a new environment that has the wheel and nothing else."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    pip += ["--isolated", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built.wheel)], check=True, timeout=120)
    return environment


def run(environment: Path, command: str, *arguments: str) -> str:
    """Return what a command of the environment prints, run outside of the checkout."""
    done = subprocess.run(
        [str(environment / "bin" / command), *arguments],
        cwd=environment,
        env={},  # no PYTHONPATH
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def names(wheel: Path) -> set[str]:
    """Return the files of a wheel, but for what is written about them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/RECORD")}


def test_wheel_has_the_whole_package_and_nothing_else(built: Distributions) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    metadata = f"nbl_modifier-{VERSION}.dist-info/"
    found = names(built.wheel)
    assert {name for name in found if not name.startswith(metadata)} == expected
    assert {"nbl_modifier/py.typed", f"{metadata}licenses/LICENSE"} <= found


def test_source_distribution_builds_the_same_wheel(
    built: Distributions, tmp_path: Path
) -> None:
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"nbl_modifier-{VERSION}"
    again = build(tmp_path / "dist", unpacked)
    assert names(again.wheel) == names(built.wheel)
    assert (unpacked / "CITATION.cff").is_file()


def test_command_answers_where_nothing_else_is_installed(installed: Path) -> None:
    assert run(installed, "nbl", "--version") == f"nbl {VERSION}"
    assert "nbl compress" in run(installed, "nbl", "--help")


def test_entry_points_are_found(installed: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "for entry in entry_points(group='vllm.general_plugins'):\n"
        "    print(entry.name, entry.load().__module__)\n"
    )
    assert run(installed, "python", "-c", code) == "nbl nbl_modifier.vllm_plugin"


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
