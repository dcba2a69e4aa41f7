# SPDX-License-Identifier: Apache-2.0
"""Wheel and source distribution, built as a release is, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Distributions(NamedTuple):
    """
    What a release consists of.

    :param wheel: path of the wheel
    :param sdist: path of the source distribution
    """

    wheel: Path
    sdist: Path


def build(folder: Path, source: Path = ROOT) -> Distributions:
    """
    Build both.

    :param folder: where to; must be empty
    :param source: a checkout, or an unpacked source distribution
    """
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Distributions(wheel, sdist)
