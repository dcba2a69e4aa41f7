# SPDX-License-Identifier: Apache-2.0
"""
Writes tables into the docs: NBLModifier's fields, from the docstring of its options,
the criteria, and in CONTRIBUTING.md the folders, from their docstrings and the import
contract.

    python docs/generate.py

``tests/test_docs.py`` fails if a page differs.
"""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

from nbl_modifier import NBLModifier
from nbl_modifier.criteria import CRITERIA
from nbl_modifier.llmcompressor_plugin.options import Options

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nbl_modifier"
BEGIN = "<!-- {}: python docs/generate.py -->"
END = "<!-- end of {} -->"
_PARAMETER = re.compile(
    r"^:param (\w+): (.*?)(?=^:param |\Z)", re.MULTILINE | re.DOTALL
)


def described() -> dict[str, str]:
    """Return what the class of the options says of each field."""
    text = inspect.getdoc(Options) or ""
    return {
        name: " ".join(words.split()).replace("``", "`")
        for name, words in _PARAMETER.findall(text)
    }


def default(field: Any) -> str:
    """Return a field's default as it is written in a recipe."""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def fields() -> str:
    """Return the table of fields in markdown."""
    lines = ["| field | default | meaning |", "|:---|:---|:---|"]
    for name, meaning in described().items():
        field = NBLModifier.model_fields[name]
        lines.append(f"| `{name}` | {default(field)} | {meaning} |")
    return "\n".join(lines)


def criteria() -> str:
    """Return the table of criteria in markdown."""
    lines = ["| criterion | lower means | from |", "|---|---|---|"]
    for name, row in CRITERIA.items():
        origin = "trials on held-out windows" if row.tried else "statistics"
        lines.append(f"| `{name}` | {row.lower_means} | {origin} |")
    return "\n".join(lines)


def layers() -> str:
    """Return the table of folders and modules, top to bottom, in markdown."""
    contract = runpy.run_path(str(ROOT / "tests" / "test_import_contract.py"))
    lines = ["| | what | uses | packages | inside functions |", "|---|---|---|---|---|"]
    for name, layer in contract["LAYERS"].items():
        if name == "__init__":
            continue
        folder = PACKAGE / name / "__init__.py"
        path = folder if folder.exists() else PACKAGE / f"{name}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        what = " ".join(text.split("\n\n")[0].split())
        names = (_codes(each) for each in (layer.ours, layer.packages, layer.lazy))
        lines.append(f"| `{name}` | {what} | " + " | ".join(names) + " |")
    return "\n".join(lines)


def _codes(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


# Page, name between its markers, what makes the table.
TABLES = (
    ("../CONTRIBUTING.md", "layers", layers),
    ("modifier.md", "fields", fields),
    ("selection.md", "criteria", criteria),
)


def replaced(page: str, name: str, table: str) -> str:
    """
    Return the page with the table between its two markers.

    :param page: its text
    :param name: in the markers
    :param table: in markdown
    :raises ValueError: if the page has no such markers
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise ValueError(f"the page lacks {begin} or {end}. Put them where it goes.")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


if __name__ == "__main__":
    for file, name, make in TABLES:
        path = ROOT / "docs" / file
        page = path.read_text(encoding="utf-8")
        path.write_text(replaced(page, name, make()), encoding="utf-8")
