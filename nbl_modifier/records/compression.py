# SPDX-License-Identifier: Apache-2.0
"""The record of one NBL run, ``nbl_report.json`` in a checkpoint."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic.dataclasses import dataclass

from .record import CHECKED, Record

FORMAT_VERSION = 2
REPORT_FILE_NAME = "nbl_report.json"
RANKING_FILE_NAME = "nbl_ranking.json"


@dataclass(frozen=True, config=CHECKED)
class LayerResult:
    """
    What was measured on one attention layer, and what was decided about it.

    :param name: module name, such as ``model.layers.3.self_attn``
    :param index: number of the decoder layer, from 0
    :param num_tokens: unmasked rows the statistics were taken over
    :param nmse: error of the linear map over the variance of the attention
        output, in sample, dimensionless; 0 is exact, 1 is no better than its mean
    :param residual_nmse: the same error over the variance of the residual stream
        after the layer (input + attention output), dimensionless
    :param cca_bound: ``sum_i (1 - rho_i^2)`` between the residual stream before
        and after attention; NBL, arXiv:2505.21077, Algorithm 2; dimensionless,
        at most the hidden size
    :param dampening_frac: dampening used, a fraction of the mean diagonal of the
        input covariance
    :param score: the number the layer was ranked by, lower is replaced earlier; None
        if it was not finite
    :param rank: place in the ranking, 1 is replaced first
    :param selected: True if attention was replaced by a linear map here
    :param reason: why it was selected or kept, for a reader
    :param seconds: time spent on statistics and solve for this layer
    :param canonical_correlations: quantiles of the rho_i, evenly spaced from the least
        to the greatest, None where they were not asked for
    :param expected_nmse: ``nmse`` to be expected on new tokens, by degrees of freedom;
        None if there are hardly more tokens than dimensions
    :param heldout_nmse: the same measured on held-out tokens, if there are any
    :param cosine: one minus the mean cosine similarity of the residual stream before
        and after attention, dimensionless
    :param loss: increase of the mean negative log-likelihood on held-out windows when
        this layer alone is replaced, nats per token, if measured
    :param kl: divergence of the next-token distributions from the original model's on
        held-out windows when this layer alone is replaced, nats per token, if measured
    :param kl_angle: ``kl`` times the angle, in radians, between the residual stream
        before and after the original layer
    """

    name: str
    index: int
    num_tokens: int
    nmse: float
    residual_nmse: float
    cca_bound: float
    dampening_frac: float
    score: float | None
    rank: int
    selected: bool
    reason: str
    seconds: float
    canonical_correlations: list[float] | None = None
    expected_nmse: float | None = None
    heldout_nmse: float | None = None
    cosine: float | None = None
    loss: float | None = None
    kl: float | None = None
    kl_angle: float | None = None


@dataclass(frozen=True, config=CHECKED)
class HeldoutResult:
    """
    Perplexity on calibration windows that nothing was fitted on.

    Layers were chosen by it, so it is better than the perplexity on other text.

    :param num_windows: windows held out
    :param num_tokens: predicted tokens in them
    :param base: of the model before
    :param path: after each layer in the order of the ranking, where measured
    :param replaced: with all chosen layers replaced
    :param refitted: the same after the refit, if there was one
    :param distilled: the same after the distillation, if there was one
    """

    num_windows: int
    num_tokens: int
    base: float
    path: list[float | None]
    replaced: float
    refitted: float | None = None
    distilled: float | None = None


@dataclass(frozen=True, config=CHECKED)
class NBLReport(Record):
    """
    Everything measured and decided in one NBL run; `nbl_report.json` in a checkpoint.

    :param format_version: version of this layout, see ``FORMAT_VERSION``
    :param model: name or path of the model that was compressed
    :param model_type: its ``model_type`` before compression, such as ``llama``
    :param num_hidden_layers: decoder layers in the model (K)
    :param criterion: what layers were ranked by, a field of their results
    :param input: ``residual`` or ``normalized``, what the linear maps read
    :param selected_layers: indices of the replaced layers, ascending, those of earlier
        runs included; in the model that still has its dropped blocks
    :param layers: one result per layer that was measured in this run
    :param num_calibration_samples: calibration sequences
    :param num_tokens: unmasked calibration tokens over all sequences
    :param calibration_seconds: wall time of NBL's calibration epoch
    :param dampening_frac: dampening the recipe asked for
    :param recipe: the recipe as YAML text, if known
    :param versions: package name to version
    :param created: UTC time, ISO 8601
    :param evaluation: figure name to value, such as ``perplexity base``
    :param previous: report of the run that this one started from, if the model was
        linearized already
    :param selection: ``one_shot`` or ``greedy``
    :param refit: whether the chosen layers were fitted again, on each other's output
    :param distill_epochs: how often the maps were trained over the calibration windows
    :param binding: the limit that ended the choice, in words
    :param heldout: perplexities on held-out windows, if there were any
    :param training: how the weights were trained after the layers were replaced, in
        words
    :param kind: ``attention`` or ``block``, what was replaced
    :param method: ``linear`` or ``drop``, what replaced it
    :param estimator: ``lmmse`` or ``wo_wv``, where the linear maps come from
    :param rank: of the linear maps; None: full rank
    :param kv_cache_context: tokens of a sequence that its KV cache is counted for
    :param kv_cache_left: bytes that vLLM sets aside for such a sequence, over the base
        model's; None: they cannot be told from the configuration
    """

    TITLE: ClassVar[str] = "an NBL report"
    REMEDY: ClassVar[str] = (
        "Run the compression again, or restore the file; the report of a checkpoint is "
        f"{REPORT_FILE_NAME}."
    )
    VERSION: ClassVar[int] = FORMAT_VERSION

    format_version: int
    model: str
    model_type: str
    num_hidden_layers: int
    criterion: str
    input: str
    selected_layers: list[int]
    layers: list[LayerResult]
    num_calibration_samples: int
    num_tokens: int
    calibration_seconds: float
    dampening_frac: float
    recipe: str | None
    versions: dict[str, str]
    created: str
    evaluation: dict[str, float] | None = None
    previous: NBLReport | None = None
    selection: str = "one_shot"
    refit: bool = False
    distill_epochs: int = 0
    binding: str | None = None
    heldout: HeldoutResult | None = None
    training: str | None = None
    kind: str = "attention"
    method: str = "linear"
    estimator: str = "lmmse"
    rank: int | None = None
    kv_cache_context: int | None = None
    kv_cache_left: float | None = None

    @property
    def num_replaced(self) -> int:
        """Number of replaced layers (m)."""
        return len(self.selected_layers)

    @property
    def subject(self) -> str:
        """What was replaced, in the plural: ``attention layers`` or ``blocks``."""
        return "attention layers" if self.kind == "attention" else "blocks"

    @property
    def outcome(self) -> str:
        """What was done to them, in words."""
        if self.method == "drop":
            return "dropped"
        rank = "" if self.rank is None else f" of rank {self.rank}"
        return f"replaced by one linear map{rank} each"

    @property
    def kv_cache_fraction(self) -> float:
        """
        KV cache of a sequence of ``kv_cache_context`` tokens, over the base model's.

        Where all layers are alike, and for reports that do not say,
        ``(K - m) / K``.
        """
        if self.kv_cache_left is not None:
            return self.kv_cache_left
        return (self.num_hidden_layers - self.num_replaced) / self.num_hidden_layers

    @property
    def kv_cache_subject(self) -> str:
        """What ``kv_cache_fraction`` is of, in words."""
        alike = (self.num_hidden_layers - self.num_replaced) / self.num_hidden_layers
        if self.kv_cache_left is None or math.isclose(self.kv_cache_left, alike):
            return "KV cache per token"
        return f"KV cache of a sequence of {self.kv_cache_context:,} tokens"

    @property
    def ranking(self) -> list[LayerResult]:
        """The measured layers, the one to replace first in front."""
        return sorted(self.layers, key=lambda layer: layer.rank)
