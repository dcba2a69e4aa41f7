"""Which layers to linearize, and why. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Choice", "choose_layers"]


@dataclass(frozen=True)
class Choice:
    """
    What was decided about one layer.

    :param index: decoder layer
    :param rank: place in the ranking, 1 is linearized first
    :param selected: whether it is linearized
    :param reason: the decision in words, for logs and reports
    """

    index: int
    rank: int
    selected: bool
    reason: str


def choose_layers(
    scores: Mapping[int, float],
    criterion: str,
    *,
    num_layers: int | None = None,
    layers: Sequence[int] | None = None,
    budget: str | None = None,
) -> list[Choice]:
    """
    Rank layers by ascending score and choose the first ``num_layers``, or ``layers``.

    One-shot selection, NBL, arXiv:2505.21077, Algorithm 1. Equal scores are ranked by
    index, so that the choice is the same in every run.

    :param scores: score by decoder layer index, dimensionless, lower is linearized
        earlier
    :param criterion: name of the score, for the reasons
    :param num_layers: how many to choose
    :param layers: the layers to choose, whatever their rank
    :param budget: what ``num_layers`` follows from, for the reasons
    :return: one choice per layer, by rank
    :raises ValueError: if not exactly one of ``num_layers`` and ``layers`` is given, or
        it asks for layers without a score
    """
    if (num_layers is None) == (layers is None):
        raise ValueError("choose_layers: give exactly one of num_layers and layers.")
    missing = sorted(set(layers or ()) - set(scores))
    if missing or (num_layers or 0) > len(scores):
        raise ValueError(
            f"choose_layers: asked for num_layers={num_layers}, layers={layers}, but "
            f"only layers {sorted(scores)} have a score."
        )
    order = sorted(scores, key=lambda index: (scores[index], index))
    choices = []
    for rank, index in enumerate(order, start=1):
        place = f"rank {rank} of {len(order)} by {criterion}"
        if num_layers is None:
            selected = index in (layers or ())
            reason = (
                f"named in layers ({place})" if selected else f"not in layers ({place})"
            )
        else:
            selected = rank <= num_layers
            reason = f"{place}, num_layers={num_layers}"
            if budget is not None:
                reason += f" from {budget}"
        choices.append(Choice(index, rank, selected, reason))
    return choices
