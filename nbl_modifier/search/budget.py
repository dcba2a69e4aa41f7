"""Which layers to replace: how many, and why each one. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Budget", "Choice", "count_layers", "explain"]


@dataclass(frozen=True)
class Budget:
    """
    When to stop replacing layers: at the first limit that is reached.

    :param num_layers: how many layers to replace at most
    :param reason: where ``num_layers`` comes from, in words
    :param max_nmse: largest error of a linear map that may be used, over the variance
        of what it replaces, on held-out tokens
    :param max_perplexity_increase: largest increase of perplexity on held-out windows,
        over the perplexity of the model before
    """

    num_layers: int
    reason: str
    max_nmse: float | None = None
    max_perplexity_increase: float | None = None


@dataclass(frozen=True)
class Choice:
    """
    What was decided about one layer.

    :param index: decoder layer
    :param rank: place in the ranking, 1 is replaced first
    :param selected: whether it is replaced
    :param reason: the decision in words, for logs and reports
    """

    index: int
    rank: int
    selected: bool
    reason: str


def explain(
    order: Sequence[int],
    selected: Collection[int],
    criterion: str,
    binding: str,
    unfit: Mapping[int, str],
) -> list[Choice]:
    """
    Return what was decided about each layer, and why.

    :param order: all candidates, the first to be replaced in front
    :param selected: those that are replaced
    :param criterion: name of what they were ranked by
    :param binding: the limit that ended the choice, in words
    :param unfit: why a layer could not be chosen whatever its rank, by index
    :return: one choice per layer, by rank
    """
    return [
        Choice(
            index,
            rank,
            index in selected,
            f"rank {rank} of {len(order)} by {criterion}, {unfit.get(index, binding)}",
        )
        for rank, index in enumerate(order, start=1)
    ]


def count_layers(
    num_layers: int | None,
    kv_cache_reduction: float | None,
    *,
    total: int,
    linear: int,
    available: int,
) -> tuple[int, str]:
    """
    Return how many layers to replace at most, and in words why.

    :param num_layers: asked for
    :param kv_cache_reduction: part of the KV cache to free instead, in (0, 1]; layers
        are taken to be alike. Without either: all that are available
    :param total: decoder layers of the model
    :param linear: of these, those that are linear already
    :param available: of these, those to choose from
    :raises ValueError: naming the recipe's field, if there are not so many
    """
    if num_layers is not None:
        if num_layers > available:
            raise ValueError(
                f"NBLModifier.num_layers: there are {available} layers "
                f"to choose from, got {num_layers}. Use {available} or fewer."
            )
        return num_layers, f"num_layers={num_layers}"
    if kv_cache_reduction is None:
        return available, f"all {available} candidates"
    # 0.1 * 30 is 3.0000000000000004 in binary; it asks for 3 layers.
    wanted = math.ceil(kv_cache_reduction * total - 1e-9)
    count = wanted - linear
    if not 0 < count <= available:
        raise ValueError(
            f"NBLModifier.kv_cache_reduction: {kv_cache_reduction} takes {wanted} of "
            f"{total} layers, of which {linear} are linear already and {available} can "
            f"be chosen from. Use a value above {linear / total:.4g}, up to "
            f"{(linear + available) / total:.4g}."
        )
    return count, f"num_layers={count} from kv_cache_reduction={kv_cache_reduction}"
