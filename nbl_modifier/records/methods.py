# SPDX-License-Identifier: Apache-2.0
"""
Quality of compression methods over numbers of layers: ``nbl_methods.json``.

``benchmarks/paper_table.py`` writes the file, as it goes. Where a number has a standard
error the two are a list, the error null if none is known.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from pydantic.dataclasses import dataclass

from .record import CHECKED, Record

__all__ = ["METHODS_FILE_NAME", "MethodRow", "MethodsTable", "TextResult", "Value"]

METHODS_FILE_NAME = "nbl_methods.json"
FORMAT_VERSION = 1

# A number and its standard error, if that is known.
Value = tuple[float, float | None]


@dataclass(frozen=True, config=CHECKED)
class TextResult:
    """
    Perplexity on one text. Errors are over windows, two models compared in pairs.

    :param perplexity: per token
    :param over_base: that over the base model's
    :param over_best: that over the one of the best method at the same number of layers;
        None where that is not known yet
    :param recovered: the part of what the reference method loses that is not lost here,
        which tables call loss avoided; None where that is not known yet
    """

    perplexity: Value
    over_base: Value | None = None
    over_best: Value | None = None
    recovered: Value | None = None


@dataclass(frozen=True, config=CHECKED)
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
    :param average: mean accuracy over the tasks that were measured of any model, errors
        pooled over them; None until all of these are there
    :param over_base: the average minus the base model's, documents compared in pairs
    :param over_reference: the average minus the reference method's at the same number
        of layers, documents compared in pairs
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
    speed: dict[str, Value] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True, config=CHECKED, kw_only=True)
class MethodsTable(Record):
    """
    Every row so far.

    :param model: the base model, a directory or a Hugging Face name
    :param num_layers: its decoder layers
    :param reference: method whose loss the others are held against, NBL as in the paper
    :param best: method that the others are compared with
    :param calibrated_on: text that was calibrated on, and how much of it
    :param measured_on: what was measured, and on how much
    :param rows: the base model's first
    :param versions: of packages
    :param created: when, UTC
    :param format_version: version of this layout
    """

    TITLE: ClassVar[str] = "a table of methods"
    REMEDY: ClassVar[str] = "Run benchmarks/paper_table.py again."
    VERSION: ClassVar[int] = FORMAT_VERSION
    INDENT: ClassVar[int] = 1

    format_version: int = FORMAT_VERSION
    model: str
    num_layers: int
    reference: str
    best: str
    calibrated_on: str
    measured_on: str
    rows: list[MethodRow]
    versions: dict[str, str]
    created: str
