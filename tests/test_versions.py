# SPDX-License-Identifier: Apache-2.0
"""What ``make integration-versions`` found, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration_tests.versions import (
    BEGIN,
    END,
    PAGE,
    REQUIREMENTS,
    TRANSFORMERS_TESTS,
    VLLM_TESTS,
    read_junit,
    read_results,
    render,
    replaced,
)

JUNIT = """<testsuites><testsuite>
<testcase name="test_greedy_tokens[row]"><properties>
<property name="compared" value="640 of 640"/></properties></testcase>
<testcase name="test_broken[row]"><failure message="no">...</failure></testcase>
<testcase name="test_error"><error message="no">...</error></testcase>
<testcase name="test_left_out"><skipped message="why"/></testcase>
</testsuite></testsuites>"""


def test_numbers_of_a_pytest_run_are_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(JUNIT, "utf-8")
    assert read_junit(path) == {
        "tests": {"passed": 1, "failed": 2, "skipped": 1},
        "failed": ["test_broken[row]", "test_error"],
        "measured": {"test_greedy_tokens": {"compared": "640 of 640"}},
    }


def test_what_is_run_is_there() -> None:
    for name in (VLLM_TESTS[0], *TRANSFORMERS_TESTS):
        assert (PAGE.parents[1] / name).is_file(), name


def test_every_environment_was_run_as_it_is_pinned() -> None:
    results = {each["name"]: each for each in read_results()}
    assert results.keys() == {path.stem for path in REQUIREMENTS.glob("*.txt")}
    for name, result in results.items():
        pins = (REQUIREMENTS / f"{name}.txt").read_text("utf-8")
        for package, version in re.findall(r"^([\w-]+)==(\S+)$", pins, re.MULTILINE):
            found = result["packages"].get(package, version).removesuffix("+cpu")
            assert found == version


def test_page_has_the_stored_results() -> None:
    page = PAGE.read_text("utf-8")
    assert replaced(page, render(read_results())) == page


def test_a_failed_run_shows() -> None:
    results = read_results()
    assert ": fails" not in render(results)
    results[0]["passed"] = False
    assert render(results).count(": fails") == 1


def test_page_must_have_its_markers() -> None:
    with pytest.raises(ValueError, match=r"versions\.md lacks the lines"):
        replaced("no tables here", "tables")
    assert replaced(f"a{BEGIN}old{END}b", "new") == f"a{BEGIN}\n\nnew\n\n{END}b"
