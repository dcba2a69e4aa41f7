# SPDX-License-Identifier: Apache-2.0
"""
Writes tables into the docs: NBLModifier's fields, from the docstring of its options,
the criteria, what a real model keeps, from the stored results, what the preset costs,
counted as runs count it, and in CONTRIBUTING.md the folders, from their docstrings and
the import contract.

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
from nbl_modifier.calibration.cost import Cost
from nbl_modifier.calibration.phases import Settings, plan
from nbl_modifier.criteria import CRITERIA, TRIED
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.windows import held_out_batches
from nbl_modifier.llmcompressor_plugin.distill import Distill
from nbl_modifier.llmcompressor_plugin.options import Options
from nbl_modifier.records.methods import METHODS_FILE_NAME, MethodsTable, Value
from nbl_modifier.search.copying import num_repeating
from nbl_modifier.search.distillation import RATES
from nbl_modifier.search.schedule import few_windows

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nbl_modifier"
REAL_MODEL = ROOT / "benchmarks" / "results" / "smollm2" / METHODS_FILE_NAME
# What the cost is counted for: layers of Llama-3.1-8B, windows of the paper's
# calibration set and their tokens, and a quarter of the layers to replace.
COUNTED = (32, 256, 2048, 8)
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
        if name == "criterion":
            meaning += f"; one of {_codes(' '.join(CRITERIA))}"
        lines.append(f"| `{name}` | {default(field)} | {meaning} |")
    return "\n".join(lines)


def criteria() -> str:
    """Return the table of criteria in markdown."""
    lines = ["| criterion | lower means | from |", "|---|---|---|"]
    for name, row in CRITERIA.items():
        origin = "trials on held-out windows" if row.tried else "statistics"
        lines.append(f"| `{name}` | {row.lower_means} | {origin} |")
    return "\n".join(lines)


def real_model() -> str:
    """Return what the attention methods keep of the real model, in markdown."""
    table = MethodsTable.load(REAL_MODEL)
    rows = [
        row for row in table.rows if row.method in (table.reference, table.best, "DROP")
    ]
    texts = list(dict.fromkeys(name for row in rows for name in row.texts))
    header = [f"m of {table.num_layers}", "method", *texts, "facts kept"]
    lines = [f"| {' | '.join(header)} |", "|---:|---|" + "---:|" * (len(texts) + 1)]
    for row in rows:
        cells = [str(row.m), row.method]
        cells += [_with_error(row.texts[name].over_base) for name in texts]
        cells.append("" if row.facts is None else f"{row.facts[0]} of {row.facts[1]}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(value: Value | None) -> str:
    return "" if value is None else f"{value[0]:.3f} ± {value[1] or 0.0:.3f}"


def cost() -> str:
    """Return the passes of the paper's settings and of the preset, in markdown."""
    num_layers, windows, tokens, count = COUNTED
    recipes = {
        "without a preset": NBLModifier(num_layers=count),
        "`preset: best`, `distill: {epochs: 0}`": NBLModifier(
            num_layers=count, preset="best", distill=Distill(epochs=0)
        ),
        "`preset: best`": NBLModifier(num_layers=count, preset="best"),
        "`preset: best`, `copying: true`": NBLModifier(
            num_layers=count, preset="best", copying=True
        ),
    }
    lines = [
        "| | measuring | choosing | distillation | forward passes | backward passes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, recipe in recipes.items():
        held_out = len(held_out_batches([tokens] * windows)) if recipe.holds_out else 0
        settings = Settings(
            num_layers=num_layers,
            windows=windows,
            held_out=held_out,
            candidates=range(num_layers),
            count=count,
            tried=recipe.criterion in TRIED,
            greedy=recipe.selection == "greedy",
            epochs=recipe.distill.epochs,
            rates=len(RATES),
            few=few_windows(None, Ranks()),
            repeating=num_repeating(held_out) if recipe.copying else 0,
        )
        made = Cost(num_layers, windows, windows * tokens, plan(settings))
        of = {phase.name: made.passes_of(phase) for phase in made.phases}
        backward = sum(each.backward for each in made.phases) / (num_layers * windows)
        cells = [
            of.get(each, 0.0) for each in ("measuring", "selection", "distillation")
        ]
        cells += [made.passes, backward]
        assert abs(sum(cells[:3]) - made.passes) < 1e-9, "a phase has no column"
        lines.append(
            f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |"
        )
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
    ("selection.md", "real model", real_model),
    ("selection.md", "cost", cost),
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
