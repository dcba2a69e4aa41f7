# SPDX-License-Identifier: Apache-2.0
"""
The record of one ``nbl benchmark`` and its JSON form, ``nbl_benchmark.json``.

Times are in seconds, speeds in tokens per second, and lists of speeds hold one value
per round, base and compressed measured next to each other.
"""

from __future__ import annotations

import statistics
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from .record import CHECKED, Record

__all__ = [
    "FORMAT_VERSION",
    "SPEED_FILE_NAME",
    "Capacity",
    "MeasuredModel",
    "SkippedCell",
    "SpeedReport",
    "SpeedRow",
]

FORMAT_VERSION = 1
SPEED_FILE_NAME = "nbl_benchmark.json"


@dataclass(frozen=True, config=CHECKED)
class MeasuredModel:
    """
    One of the two models.

    :param name: directory or Hugging Face name
    :param architecture: class in the engine
    :param num_layers: decoder layers (K)
    :param linearized: indices of the layers without attention, ascending
    :param weight_bytes: of the weights that are multiplied
    :param kv_bytes_per_token: of the KV cache, all layers, from the shapes
    :param measured_kv_bytes_per_token: the same as the engine holds it; None where the
        engine allots the cache in advance
    :param load_seconds: time to start the engine
    """

    name: str
    architecture: str
    num_layers: int
    linearized: list[int]
    weight_bytes: float
    kv_bytes_per_token: float
    measured_kv_bytes_per_token: float | None
    load_seconds: float


@dataclass(frozen=True, config=CHECKED)
class Capacity:
    """
    What fits in the KV cache. None where the engine has no fixed cache.

    :param base_tokens: tokens of the base model
    :param compressed_tokens: tokens of the compressed model
    :param predicted_ratio: of the two, from the caches' bytes per token; None if the
        compressed model has no cache
    :param largest_batch: by context length (a string): how many sequences of that
        length, and what they generate, fit at once, base first
    """

    base_tokens: int | None
    compressed_tokens: int | None
    predicted_ratio: float | None
    largest_batch: dict[str, list[int]]

    @property
    def ratio(self) -> float | None:
        """Compressed over base."""
        if not self.base_tokens or self.compressed_tokens is None:
            return None
        return self.compressed_tokens / self.base_tokens


@dataclass(frozen=True, config=CHECKED)
class SpeedRow:
    """
    One phase of one grid point.

    :param phase: ``prefill``: prompt tokens until each sequence has its first token;
        ``decode``: tokens generated with all sequences running
    :param context: prompt tokens per sequence
    :param batch: sequences
    :param generated: tokens per sequence that decoding was timed over; 0 for prefill
    :param base: tokens per second of all sequences together, one value per round
    :param compressed: the compressed model's tokens per second, in the same rounds
    :param predicted_base: the base model's by the roofline, tokens per second
    :param predicted_compressed: the compressed model's by the roofline
    """

    phase: Literal["prefill", "decode"]
    context: int
    batch: int
    generated: int
    base: list[float]
    compressed: list[float]
    predicted_base: float
    predicted_compressed: float

    @property
    def ratios(self) -> list[float]:
        """Compressed over base, by round."""
        return [c / b for b, c in zip(self.base, self.compressed, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of :attr:`ratios`."""
        return statistics.median(self.ratios)

    @property
    def predicted_ratio(self) -> float:
        """Compressed over base by bytes and floating-point operations."""
        return self.predicted_compressed / self.predicted_base

    @property
    def attained(self) -> float:
        """The measured ratio over the predicted one."""
        return self.ratio / self.predicted_ratio


@dataclass(frozen=True, config=CHECKED)
class SkippedCell:
    """
    A grid point that was not measured.

    :param context: prompt tokens per sequence
    :param batch: sequences
    :param reason: why not, for a reader
    """

    context: int
    batch: int
    reason: str


@dataclass(frozen=True, config=CHECKED)
class SpeedReport(Record):
    """
    Everything measured in one ``nbl benchmark``.

    :param format_version: version of this layout
    :param engine: ``vllm`` or ``transformers``
    :param base: the base model
    :param compressed: the compressed model
    :param capacity: of the KV cache
    :param rows: what was measured
    :param skipped: what was not, and why
    :param settings: name to value: dtype, attention, rounds and the like
    :param machine: ``device``, ``threads``, ``flops_per_second`` and
        ``bytes_per_second``, the best that torch reached before the measurements
    :param versions: package name to version
    :param created: UTC time, ISO 8601
    """

    TITLE: ClassVar[str] = "a benchmark"
    REMEDY: ClassVar[str] = "Run nbl benchmark again."
    VERSION: ClassVar[int] = FORMAT_VERSION

    format_version: int
    engine: Literal["vllm", "transformers"]
    base: MeasuredModel
    compressed: MeasuredModel
    capacity: Capacity
    rows: list[SpeedRow]
    skipped: list[SkippedCell]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    created: str
