# SPDX-License-Identifier: Apache-2.0
"""README and docs/: generated parts are up to date, links and names lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from llmcompressor.modifiers import Modifier

from nbl_modifier import NBLModifier
from nbl_modifier.cli import main
from nbl_modifier.evaluation.texts import stdlib_texts
from tests.tiny_llama import DEMO_MODEL, load

pytestmark = pytest.mark.begin

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
_LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
_SCRIPT = re.compile(r"python ((?:benchmarks|examples|docs)/\w+\.py)")


def test_fields_are_those_of_the_class() -> None:
    """Every public field is described."""
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    inherited = set(Modifier.model_fields)
    own = set(NBLModifier.model_fields) - inherited - {"requires_calibration_data"}
    assert set(generate["described"]()) == own


def test_tables_are_what_the_code_says() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for file, name, make in generate["TABLES"]:
        page = (ROOT / "docs" / file).read_text(encoding="utf-8")
        assert generate["replaced"](page, name, make()) == page, file


def test_readme_has_the_cost_of_the_preset() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    row = next(r for r in generate["cost"]().splitlines() if "| `preset: best` |" in r)
    forward, backward = (float(cell) for cell in row.split("|")[5:7])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"about {forward:.0f} passes forward and {backward:.0f} backward" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_scripts_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in _LINK.findall(text):
        assert (page.parent / link).exists(), link
    for script in _SCRIPT.findall(text):
        assert (ROOT / script).is_file(), script


def test_readme_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python, and its commands up to those that need vLLM, on the bundled model."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(DEMO_MODEL)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    texts = [{"text": text} for text in stdlib_texts("calibration")[:20]]
    (tmp_path / "calibration.json").write_text(json.dumps(texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    # few and short, but as they are in all else
    for number, fewer in (("=128", "=8"), ("=512", "=128")):
        assert number in script
        script = script.replace(number, fewer)
    exec(compile(script, "README.md", "exec"), {})
    assert (tmp_path / "SmolLM2-NBL8-FP8" / "nbl_report.json").is_file()
    for block in re.findall(
        r"```bash\n(nbl (?:compress|rank).*?)```", readme, re.DOTALL
    ):
        for command in block.replace("\\\n", " ").strip().splitlines():
            words = shlex.split(command)
            few = ["--num-samples", "16", "--max-seq-length", "128"]
            if words[1] == "compress" and "--statistics" in words:
                few = []  # statistics stand for data
            assert main([*words[1:], *few]) == 0, command
    assert load(tmp_path / "SmolLM2-NBL").config.nbl_config["layers"]


def test_results_are_the_measured_ones() -> None:
    """The rows of the real model on the page, and their numbers in README."""
    folder = ROOT / "benchmarks" / "results" / "smollm2"
    measured = (folder / "table.md").read_text(encoding="utf-8")
    table = re.findall(r"(?:^\|.*\n)+", measured, re.MULTILINE)[0]
    assert table in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d\.\d{4} ± \d\.\d{4}", readme)
    assert len(numbers) == 6
    assert all(number in table for number in numbers)


def test_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 160
