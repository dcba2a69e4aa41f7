# SPDX-License-Identifier: Apache-2.0
"""The settings that benchmarks/selection_study.py compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nbl_modifier.criteria import CRITERIA
from nbl_modifier.hf.configuration_nbl import LinearizedLayer


@dataclass(frozen=True)
class Setting:
    """
    One way to choose layers and to replace them: fields as of NBLModifier.

    :param criterion: what layers are ranked by
    :param selection: ``one_shot`` or ``greedy``
    :param refit: whether the chosen layers are fitted again
    :param input: what the maps read
    :param kind: ``attention`` or ``block``
    :param method: ``linear`` or ``drop``
    :param rank: of the maps; None: full
    :param dampening_frac: of C_xx
    :param epochs: how often the maps are trained over the windows
    """

    criterion: str = "cca_bound"
    selection: str = "one_shot"
    refit: bool = False
    input: Literal["residual", "normalized"] = "residual"
    kind: Literal["attention", "block"] = "attention"
    method: Literal["linear", "drop"] = "linear"
    rank: int | None = None
    dampening_frac: float = 0.0
    epochs: int = 0

    @property
    def spec(self) -> LinearizedLayer:
        """What is done to each chosen layer."""
        return LinearizedLayer(self.input, self.kind, self.method, self.rank)

    @property
    def ranking(self) -> Setting:
        """What decides about the layers: maps of full rank, whatever they end up as."""
        return replace(self, refit=False, rank=None, epochs=0)

    @property
    def fit(self) -> Setting:
        """What decides about the maps of given layers."""
        if self.refit or self.method == "drop" or self.selection == "one_shot":
            return replace(self, criterion="", selection="one_shot")
        return self


PAPER = Setting()
CLOSED_FORM = Setting("loss", "greedy", True, "normalized")
BEST = replace(CLOSED_FORM, epochs=4)
DISTILLED_PAPER = replace(PAPER, epochs=4)
DAMPENING = (0.01, 0.05, 0.2)
VARIANTS = {"paper": PAPER, "closed form": CLOSED_FORM, "best": BEST}
NAMED = {
    "paper": PAPER,
    "preset best": BEST,
    "preset best, in closed form": CLOSED_FORM,
    "attention DROP": Setting("cosine", method="drop"),
    "block NBL": Setting(kind="block"),
    "block DROP": Setting("cosine", kind="block", method="drop"),
    "SLEB": Setting("loss", "greedy", kind="block", method="drop"),
}


def criteria_settings() -> list[Setting]:
    """Return the criteria, each ranking once, and what the paper compares with."""
    ranked = [Setting(criterion) for criterion in CRITERIA]
    return [*ranked, Setting("cosine", method="drop")]


def main_settings() -> list[Setting]:
    """Return criterion x selection x refit x input, where it may say something."""
    settings = []
    for refit in (False, True):
        settings += [Setting(criterion, refit=refit) for criterion in CRITERIA]
        settings += [Setting(c, "greedy", refit) for c in ("cca_bound", "loss", "kl")]
        settings += [
            Setting(criterion, refit=refit, input="normalized")
            for criterion in ("cca_bound", "residual_nmse", "kl")
        ]
        settings += [Setting(c, "greedy", refit, "normalized") for c in ("loss", "kl")]
    return [*settings, DISTILLED_PAPER, BEST]
