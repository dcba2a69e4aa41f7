"""Measuring and ranking alone: what NBLModifier would choose from, and why."""

from __future__ import annotations

from typing import Self

from llmcompressor.core import State
from pydantic import PrivateAttr, model_validator

from nbl_modifier.records.compression import NBLReport
from nbl_modifier.search.outcome import Outcome

from .measuring import MeasuringModifier

__all__ = ["RankingModifier"]

# Fields of NBLModifier that decide what is replaced and how, so not what is measured.
_WITHOUT_EFFECT = (
    "num_layers",
    "kv_cache_reduction",
    "max_nmse",
    "max_perplexity_increase",
    "preset",
    "selection",
    "refit",
    "distill",
)


class RankingModifier(MeasuringModifier):
    """
    Measures and ranks the layers as :class:`NBLModifier` does, and replaces none.

    The model is left as it is, and nothing is saved but, on request, the statistics.

    :param canonical_correlations: whether the ranking holds quantiles of each layer's
        canonical correlations, which takes an SVD per layer
    """

    canonical_correlations: bool = False

    _ranking: NBLReport | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> Self:
        for name in _WITHOUT_EFFECT:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"RankingModifier replaces no layer, so {name} has no effect, got "
                    f"{name}: {value}. Remove it, or use NBLModifier."
                )
        return self

    @property
    def ranking(self) -> NBLReport:
        """
        What was measured, no layer selected.

        :raises RuntimeError: before calibration has ended
        """
        if self._ranking is None:
            raise RuntimeError("the layers have not been measured yet. Run oneshot().")
        return self._ranking

    @property
    def ranks_only(self) -> bool:
        """Whether no layer is to be replaced."""
        return True

    @property
    def reports_correlations(self) -> bool:
        """Whether quantiles of the canonical correlations are asked for."""
        return self.canonical_correlations

    def _conclude(self, state: State, outcome: Outcome, report: NBLReport) -> None:  # noqa: ARG002
        """Keep the report, and leave the model as it is."""
        self._ranking = report
