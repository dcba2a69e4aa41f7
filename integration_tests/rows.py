"""
The cases that the integration tests run, read from ``configs/``: see ``README.md``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

__all__ = [
    "DEMO_MODEL",
    "REAL_MODELS",
    "Row",
    "families",
    "features",
    "more_families",
    "more_features",
    "rows",
]

ROOT = Path(__file__).parents[1]
# pytest finds scripts there by itself, `python -m integration_tests....` does not.
sys.path.append(str(ROOT / "examples"))

from real_model import MODELS as REAL_MODELS  # noqa: E402  # found by the line above

CONFIGS = Path(__file__).with_name("configs")
MATRIX = Path(__file__).with_name("families.yaml")
DEMO_MODEL = "pycode-4m"


@dataclass(frozen=True)
class Row:
    """
    One case: a checkpoint, how it is served, and what must hold.

    :param name: what ``pytest -k`` takes
    :param recipe: llm-compressor recipe, or the path of one in this repository
    :param linearized: layers that must come out linear, or how many
    :param dtype: as in vLLM and transformers
    :param expect: what must hold; each key is read by one test
    :param model: the bundled model, one that ``examples/real_model.py`` fetches, or the
        family of a small random one
    :param engine: arguments of ``vllm.LLM`` besides the defaults
    :param in_process: run the engine in the worker itself, which starts faster and lets
        the test look inside; otherwise in processes of its own, as in production
    :param lora: serve it with a LoRA adapter on attention and on the linear layers
    :param repeat: run the prompts twice
    :param slow: leave the row out of ``make test``
    :param unsupported: what vLLM says when it is asked for this, with the row's
        checkpoint and with the model it was made from
    :param cell: family and feature, if the row is a cell of the support table
    """

    name: str
    recipe: str | dict[str, Any]
    linearized: int | list[int]
    dtype: str
    expect: dict[str, Any] = field(default_factory=dict)
    model: str = DEMO_MODEL
    engine: dict[str, Any] = field(default_factory=dict)
    in_process: bool = True
    lora: bool = False
    repeat: bool = False
    slow: bool = False
    unsupported: str | None = None
    cell: tuple[str, str] | None = None

    @property
    def recipe_text(self) -> str:
        """The recipe as YAML."""
        if isinstance(self.recipe, str):
            return (ROOT / self.recipe).read_text(encoding="utf-8")
        return yaml.safe_dump(self.recipe, sort_keys=False)

    @property
    def nbl_text(self) -> str:
        """The recipe without all that comes after NBL, as YAML."""
        return self._part(lambda name: name == "NBLModifier")

    @property
    def quantizer_text(self) -> str | None:
        """The recipe without NBL, as YAML; None if there is nothing else."""
        modifiers = yaml.safe_load(self.recipe_text)["default_stage"][
            "default_modifiers"
        ]
        if modifiers.keys() == {"NBLModifier"}:
            return None
        return self._part(lambda name: name != "NBLModifier")

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """What ``pytest -m`` tells the row by."""
        slow = [pytest.mark.slow] if self.slow else []
        return slow + [pytest.mark.real_model] * (self.model in REAL_MODELS)

    @property
    def tensor_parallel(self) -> int:
        """Over how many processes each layer is spread."""
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def pipeline_parallel(self) -> int:
        """Over how many processes the layers are spread."""
        return int(self.engine.get("pipeline_parallel_size", 1))

    def _part(self, belongs: Callable[[str], bool]) -> str:
        modifiers = yaml.safe_load(self.recipe_text)["default_stage"][
            "default_modifiers"
        ]
        part = {name: fields for name, fields in modifiers.items() if belongs(name)}
        return yaml.safe_dump(
            {"default_stage": {"default_modifiers": part}}, sort_keys=False
        )


def rows(expectation: str | None = None) -> list[Any]:
    """
    Return the rows as pytest parameters.

    :param expectation: only rows whose ``expect`` has this key; the rest never has any
        but ``unsupported``, which stands for ``Row.unsupported``
    """
    return [
        pytest.param(row, id=row.name, marks=row.marks)
        for row in _all_rows()
        if expectation is None
        or (row.unsupported is None and expectation in row.expect)
        or (row.unsupported is not None and expectation == "unsupported")
    ]


def families() -> dict[str, str]:
    """Return the families of the support table and their titles, in its order."""
    return {name: row["title"] for name, row in _matrix()["families"].items()}


def more_families() -> dict[str, str]:
    """Return the families of the second support table and their titles, in order."""
    return {name: row["title"] for name, row in _matrix()["more"]["families"].items()}


def more_features() -> dict[str, str]:
    """Return the features of the second support table and their headings, in order."""
    return {name: features()[name] for name in _matrix()["more"]["features"]}


def features() -> dict[str, str]:
    """Return the features of the support table and their headings, in its order."""
    return {name: row["heading"] for name, row in _matrix()["features"].items()}


@cache
def _all_rows() -> list[Row]:
    single = [
        Row(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(CONFIGS.glob("*.yaml"))
    ]
    cells = [
        _cell(family, special, feature, content)
        for family, special in _matrix()["families"].items()
        for feature, content in _matrix()["features"].items()
    ]
    more = _matrix()["more"]
    cells += [
        _cell(family, special, feature, _matrix()["features"][feature])
        for family, special in more["families"].items()
        for feature in more["features"]
    ]
    return single + cells


@cache
def _matrix() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))
    return content


def _cell(
    family: str, special: dict[str, Any], feature: str, content: dict[str, Any]
) -> Row:
    fields = {**_matrix()["defaults"], **content, **special.get(feature, {})}
    del fields["heading"]
    nbl = fields.pop("nbl") | special.get("nbl", {})
    modifiers = {"NBLModifier": nbl, **fields.pop("then", {})}
    return Row(
        name=f"{family}-{feature}",
        model=family,
        recipe={"default_stage": {"default_modifiers": modifiers}},
        slow=feature not in special.get("core", []),
        cell=(family, feature),
        **fields,
    )
