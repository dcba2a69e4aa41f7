"""Names that scripts of the release before use: they work, and say what to write."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("nbl_modifier.modifier", "NBLModifier", "nbl_modifier"),
        ("nbl_modifier.data", "stdlib_texts", "nbl_modifier.evaluation.texts"),
        ("nbl_modifier.data", "pack", "nbl_modifier.evaluation.token_windows"),
    ],
)
def test_old_imports_warn_and_work(old: str, name: str, new: str) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            f"from {old} import {name} as old\n"
            f"from {new} import {name} as new\n"
            "print(old is new)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "True"
    assert f"FutureWarning: {old} is going to be removed" in result.stderr
    assert new in result.stderr
