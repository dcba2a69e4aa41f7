# SPDX-License-Identifier: Apache-2.0
"""
Writes the table of NBLModifier's fields into docs/modifier.md, from its docstring.

    python docs/generate.py

``tests/test_docs.py`` fails if the page differs.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from nbl_modifier import NBLModifier

PAGE = Path(__file__).with_name("modifier.md")
BEGIN = "<!-- fields: python docs/generate.py -->"
END = "<!-- end of fields -->"
_PARAMETER = re.compile(
    r"^:param (\w+): (.*?)(?=^:param |\Z)", re.MULTILINE | re.DOTALL
)


def described() -> dict[str, str]:
    """Return what the class says of each field."""
    text = inspect.getdoc(NBLModifier) or ""
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


def render() -> str:
    """Return the table in markdown."""
    lines = ["| field | default | meaning |", "|:---|:---|:---|"]
    for name, meaning in described().items():
        field = NBLModifier.model_fields[name]
        lines.append(f"| `{name}` | {default(field)} | {meaning} |")
    return "\n".join(lines)


def replaced(page: str) -> str:
    """
    Return the page with the table between its two markers.

    :param page: its text
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
