"""Measuring and ranking alone: what NBLModifier would choose from, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmcompressor.core import State
from pydantic import PrivateAttr

from nbl_modifier.records.compression import NBLReport
from nbl_modifier.search.outcome import Outcome

from .modifier import NBLModifier

__all__ = ["RankingModifier"]


class RankingModifier(NBLModifier):
    """
    Measures and ranks the layers as :class:`NBLModifier` does, and replaces none.

    The model is left as it is, and nothing is saved but, on request, the statistics.
    """

    _ranking: NBLReport | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        """
        :param fields: those of :class:`NBLModifier` that say what to measure
        """
        super().__init__(num_layers=1, **fields)

    @property
    def ranking(self) -> NBLReport:
        """
        What was measured, no layer selected.

        :raises RuntimeError: before calibration has ended
        """
        if self._ranking is None:
            raise RuntimeError("the layers have not been measured yet. Run oneshot().")
        return self._ranking

    def _put_in_place(self, state: State, outcome: Outcome) -> None:  # noqa: ARG002
        """Keep the ranking, and have nothing to finalize."""
        report, self._report = self._report, None
        assert report is not None
        layers = [
            dataclasses.replace(layer, selected=False, reason="ranked only")
            for layer in report.layers
        ]
        kept = report.previous.selected_layers if report.previous is not None else []
        self._ranking = dataclasses.replace(
            report,
            layers=layers,
            selected_layers=kept,
            binding=None,
            kv_cache_left=None,
        )
