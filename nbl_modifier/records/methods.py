# SPDX-License-Identifier: Apache-2.0
"""
Quality of compression methods over numbers of layers: ``nbl_methods.json``.

Standard library only. ``benchmarks/paper_table.py`` writes the file, as it goes; it is
:class:`MethodsTable` as a JSON object. Where a number has a standard error the two are
a list, the error null if none is known.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from nbl_modifier.records.files import write_atomically

__all__ = ["METHODS_FILE_NAME", "MethodRow", "MethodsTable", "Value"]

METHODS_FILE_NAME = "nbl_methods.json"
FORMAT_VERSION = 1

# A number and its standard error, if that is known.
Value = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class TextResult:
    """
    Perplexity on one text. Errors are over windows, two models compared in pairs.

    :param perplexity: per token
    :param over_base: that over the base model's
    :param over_best: that over the one of the best method at the same number of layers;
        None where that is not known yet
    :param recovered: the part of what the reference method loses that is not lost here;
        None as above
    """

    perplexity: Value
    over_base: Value | None = None
    over_best: Value | None = None
    recovered: Value | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """
        Return the result of ``dataclasses.asdict``, after a round trip by JSON.

        :param fields: JSON types
        """
        values = {name: _value(entry) for name, entry in fields.items()}
        perplexity = values.pop("perplexity")
        if perplexity is None:
            raise ValueError("perplexity: is null")
        return cls(perplexity, **values)


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """
    One model: a method at one number of layers.

    :param method: its name
    :param m: layers, or blocks, that were replaced; 0 for the base model
    :param layers: which ones, by index in the base model
    :param num_parameters: weights of the model, tied ones once
    :param kv_cache: bytes per token over the base model's
    :param texts: perplexity by name of the text
    :param tasks: accuracy by task
    :param average: mean accuracy, errors pooled over tasks; None until all tasks are
        there
    :param over_base: the average minus the base model's, documents compared in pairs
    :param over_reference: the average minus the reference method's at the same number
        of layers, likewise
    :param facts: completions that are still right, of those that the base model
        completes right; None where not asked
    :param speed: tokens per second over the base model's, by phase
    :param seconds: that compressing took
    """

    method: str
    m: int
    layers: list[int]
    num_parameters: int
    kv_cache: float
    texts: dict[str, TextResult]
    tasks: dict[str, Value]
    average: Value | None = None
    over_base: Value | None = None
    over_reference: Value | None = None
    facts: tuple[int, int] | None = None
    speed: dict[str, Value] = dataclasses.field(default_factory=dict)
    seconds: float | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """
        Return the row of ``dataclasses.asdict``, after a round trip by JSON.

        :param fields: JSON types
        """
        texts = {
            name: TextResult.from_fields(entry)
            for name, entry in fields["texts"].items()
        }
        values = {key: _value(fields[key]) for key in _VALUES}
        nested = {
            key: {name: _value(each) for name, each in fields[key].items()}
            for key in ("tasks", "speed")
        }
        facts = None if fields["facts"] is None else tuple(fields["facts"])
        return cls(**{**fields, **values, **nested, "texts": texts, "facts": facts})


_VALUES = ("average", "over_base", "over_reference")


@dataclasses.dataclass(frozen=True)
class MethodsTable:
    """
    Every row so far.

    :param model: the base model, a directory or a Hugging Face name
    :param num_layers: its decoder layers
    :param reference: method that losses are recovered from, NBL as in the paper
    :param best: method that the others are compared with
    :param calibrated_on: text that was calibrated on, and how much of it
    :param measured_on: what was measured, and on how much
    :param rows: the base model's first
    :param versions: of packages
    :param created: when, UTC
    """

    model: str
    num_layers: int
    reference: str
    best: str
    calibrated_on: str
    measured_on: str
    rows: list[MethodRow]
    versions: dict[str, str]
    created: str

    def save(self, path: Path) -> None:
        """
        Write the table; a reader sees the old file or the new, never half.

        :param path: file to write, its directory must exist
        """
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1, allow_nan=False)
        write_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """
        Return the table that ``save`` wrote.

        :param path: the file
        :raises ValueError: if it is not one; the message names the file
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version {version!r}, not {FORMAT_VERSION}")
            rows = [MethodRow.from_fields(entry) for entry in fields.pop("rows")]
            return cls(rows=rows, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(
                f"{path}: not a table of methods ({type(err).__name__}: {err}). Run "
                "benchmarks/paper_table.py again."
            ) from err


def _value(entry: Any) -> Value | None:
    if entry is None:
        return None
    value, error = entry
    return float(value), None if error is None else float(error)
