# SPDX-License-Identifier: Apache-2.0
"""
The wheel beside what users have: resolved from the index, installing nothing.

No version that vLLM or llm-compressor has without us may change.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributions import build

# Metadata is all that is fetched, ten seconds for each; the index may be slow.
SECONDS = 100
pytestmark = pytest.mark.timeout(4 * SECONDS)
SERVING = ["vllm==0.30.0", "vllm==0.31.0", "vllm==0.32.0", "vllm==0.33.0"]
COMPRESSING = "llmcompressor==0.14.0.1"
# A neighbour, our extra beside it, the interpreter's version.
Case = tuple[str, str, str]
CASES: list[Case] = [
    *((each, "", "3.11") for each in SERVING),
    (SERVING[-1], "", "3.13"),
    (COMPRESSING, "[compress]", "3.11"),
]
Resolved = Future[dict[str, str]]
Beside = dict[Case, tuple[Resolved, ...]]


class UnresolvableError(Exception):
    """The resolver found no versions, and says why."""


def resolve(requirements: Sequence[str], python: str = "3.11") -> dict[str, str]:
    """
    Return name to version of what an installer would choose on Linux.

    :param requirements: as in a requirements file
    :param python: version of the interpreter to install for
    :raises UnresolvableError: if nothing meets all of them
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet"]
    command += ["--no-config", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += [
        "--python-version",
        python,
        "--python-platform",
        "x86_64-manylinux_2_35",
    ]
    try:
        done = subprocess.run(
            [*command, *index_of_pip()],
            input="\n".join(requirements),
            env=os.environ | certificates_of_pip(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index took more than {SECONDS} s")
    if done.returncode:
        raise UnresolvableError(done.stderr)
    pinned = (line.partition("==") for line in done.stdout.splitlines())
    return {name: version for name, separator, version in pinned if separator}


@functools.cache
def index_of_pip() -> list[str]:
    """Return the resolver's options for the index that pip is configured for."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
    )
    url = os.environ.get("PIP_INDEX_URL") or done.stdout.strip()
    return ["--default-index", url] if url else []


def certificates_of_pip() -> dict[str, str]:
    """Return the variable that names them, if pip is told some by one."""
    path = os.environ.get("PIP_CERT")
    return {"SSL_CERT_FILE": path} if path else {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist")).wheel


@pytest.fixture(scope="module", autouse=True)
def index() -> None:
    try:
        resolve(["safetensors==0.8.0"])
    except UnresolvableError as err:
        pytest.skip(f"the package index cannot be reached: {err}")


@pytest.fixture(scope="module")
def resolving(wheel: Path, index: None) -> Iterator[Beside]:
    """Return a neighbour's versions alone and beside us: all wait for the index now."""

    def start(neighbour: str, extra: str, python: str) -> tuple[Resolved, ...]:
        ours = f"nbl-modifier{extra} @ {wheel.as_uri()}"
        asked = [neighbour], [neighbour, ours]
        return tuple(pool.submit(resolve, names, python) for names in asked)

    with ThreadPoolExecutor(2 * len(CASES)) as pool:
        yield {case: start(*case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_neighbours_keep_their_versions(resolving: Beside, case: Case) -> None:
    alone, beside = (each.result() for each in resolving[case])
    changed = {
        name: f"{version} becomes {beside.get(name)}"
        for name, version in alone.items()
        if beside.get(name) != version
    }
    assert not changed
    assert {"torch", "transformers", "safetensors"} <= alone.keys()
    assert {"pydantic", "jinja2"} <= alone.keys()


def test_an_upper_bound_would_be_noticed() -> None:
    """What version 0.1.0 asked for: nothing to install, or another torch."""
    bound = "torch>=2.13,<2.14"
    with pytest.raises(UnresolvableError, match=r"torch==2\.14"):
        resolve(["vllm==0.33.0", bound])
    alone, beside = resolve([COMPRESSING]), resolve([COMPRESSING, bound])
    assert beside["torch"] != alone["torch"]


def test_vllm_and_llmcompressor_exclude_each_other() -> None:
    """Why README speaks of two environments; it is not this package's doing."""
    with pytest.raises(UnresolvableError, match="compressed-tensors"):
        resolve(["vllm==0.33.0", COMPRESSING])
