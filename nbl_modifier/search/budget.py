"""Which layers to replace: how many, and why each one. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from nbl_modifier.kv_cache import KVCache, LayerCache

__all__ = [
    "Budget",
    "Choice",
    "count_for_kv_cache",
    "count_layers",
    "explain",
    "frees_nothing",
]


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
    :param kinds: what each layer keeps in the KV cache, where ``quota`` asks
    :param quota: how many layers of each kind to replace at most; without: any
    """

    num_layers: int
    reason: str
    max_nmse: float | None = None
    max_perplexity_increase: float | None = None
    kinds: Mapping[int, LayerCache | None] = field(default_factory=dict)
    quota: Mapping[LayerCache, int] = field(default_factory=dict)

    def spent(self, chosen: Collection[int]) -> dict[int, str]:
        """
        Return why layers cannot be chosen any more, by index.

        :param chosen: those that are
        """
        if not self.quota:
            return {}
        counts = Counter(self.kinds[index] for index in chosen)
        return {
            index: f"no more with {kind.description}: {self.reason}"
            for index, kind in self.kinds.items()
            if index not in chosen
            and kind is not None
            and counts[kind] >= self.quota.get(kind, 0)
        }


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


def count_layers(num_layers: int | None, available: int) -> tuple[int, str]:
    """
    Return how many layers to replace at most, and in words why.

    :param num_layers: asked for; None: all that are available
    :param available: layers to choose from
    :raises ValueError: naming the recipe's field, if there are not so many
    """
    if num_layers is None:
        return available, f"all {available} candidates"
    if num_layers > available:
        raise ValueError(
            f"NBLModifier.num_layers: there are {available} layers "
            f"to choose from, got {num_layers}. Use {available} or fewer."
        )
    return num_layers, f"num_layers={num_layers}"


def count_for_kv_cache(
    reduction: float,
    cache: KVCache,
    *,
    base: KVCache,
    available: Collection[int],
    length: int,
) -> tuple[int, str, dict[LayerCache, int]]:
    """
    Return how many layers free a part of what vLLM sets aside for a sequence.

    :param reduction: that part, in (0, 1]
    :param cache: of the model as it is
    :param base: of the model before any layer was linear
    :param available: layers to choose from
    :param length: tokens of the sequence
    :return: how many, in words why, and how many of each kind
    :raises ValueError: naming the recipe's field, if it is free already, or all layers
        to choose from do not free so much
    """
    whole = base.allotted(length)
    freed = 1 - cache.allotted(length) / whole
    most = 1 - cache.without(available).allotted(length) / whole
    quota = cache.fewest(available, (1 - reduction) * whole, length)
    if quota is None or freed >= reduction - 1e-9:
        raise ValueError(
            f"NBLModifier.kv_cache_reduction: of what vLLM sets aside for {length} "
            f"tokens of a sequence {freed:.4g} are free already, and the "
            f"{len(available)} layers to choose from free {most:.4g} in all, got "
            f"{reduction}. Use a value above {freed:.4g}, up to {most:.4g}."
        )
    count = sum(quota.values())
    reason = f"num_layers={count} from kv_cache_reduction={reduction}"
    if len(quota) > 1:
        reason += f": {_by_kind(quota)}, for sequences of {length} tokens"
    return count, reason, quota


def _by_kind(counts: Mapping[LayerCache, int]) -> str:
    some = ((n, kind.description) for kind, n in counts.items() if n)
    return " and ".join(f"{n} with {description}" for n, description in some)


def frees_nothing(
    cache: KVCache, replaced: Collection[int], available: Collection[int], length: int
) -> str | None:
    """
    Return a warning if vLLM sets aside as much for a sequence as before, or more.

    :param cache: of the model before these layers were replaced
    :param replaced: these layers
    :param available: layers that there were to choose from
    :param length: tokens of the sequence
    """
    before, after = (c.allotted(length) for c in (cache, cache.without(replaced)))
    if after < before:
        return None
    text = (
        f"layers {sorted(replaced)}: replacing them frees no KV cache in vLLM for "
        f"sequences of {length} tokens ({after / before:.3f} times as much as before), "
        "since layers with several kinds of attention are allotted memory in groups of "
        "equally many."
    )
    better = cache.fewest(available, before * (1 - 1e-6), length)
    if better is None:
        return text
    return f"{text} The fewest that free some are {_by_kind(better)}."
