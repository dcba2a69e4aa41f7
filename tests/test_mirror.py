# SPDX-License-Identifier: Apache-2.0
"""Who looks for the tests of a module finds them under its name."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "nbl_modifier", ROOT / "tests"
# At least this part of the modules has a test file of its name.
LEAST = 0.9
# Tested elsewhere, by what starts them.
EXCEPTIONS = {
    "data.py": "old names: tests/test_old_names.py",
    "modifier.py": "old names: tests/test_old_names.py",
    "vllm_plugin/exchange.py": "needs vLLM: integration_tests/",
    "vllm_plugin/layers.py": "needs vLLM: integration_tests/",
    "vllm_plugin/model.py": "needs vLLM: integration_tests/",
    "vllm_plugin/stages.py": "needs vLLM: integration_tests/",
    "benchmark/vllm_driver.py": "needs vLLM: integration_tests/",
    "cli/vllm_worker.py": "needs vLLM: integration_tests/",
}


def modules() -> list[Path]:
    """Return the modules that are to have tests, relative to the package."""
    found = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    return [
        path
        for path in found
        if path.stem not in ("__init__", "__main__")
        and path.as_posix() not in EXCEPTIONS
    ]


def test_modules_have_a_test_file_of_their_name() -> None:
    missing = [
        path.as_posix()
        for path in modules()
        if not (TESTS / path.with_name(f"test_{path.name}")).exists()
    ]
    part = 1 - len(missing) / len(modules())
    assert part >= LEAST, (
        f"{part:.0%} of the modules have a test file of their name, at least "
        f"{LEAST:.0%} must. tests/<folder>/test_<module>.py is missing for: "
        f"{', '.join(missing)}"
    )


def test_exceptions_exist() -> None:
    gone = [name for name in EXCEPTIONS if not (PACKAGE / name).exists()]
    assert not gone, f"no such modules: {gone}"
