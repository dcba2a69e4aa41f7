"""Which layers a recipe means, how many of them, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from nbl_modifier.architectures import Architecture
from nbl_modifier.hf.configuration_nbl import LinearizedLayer, NBLConfigMixin
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.kv_cache import KVCache
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.replacement.candidates import candidate_layers, check_input
from nbl_modifier.replacement.realize import check_weights_map
from nbl_modifier.search.budget import Budget, count_for_kv_cache, count_layers

from . import saving
from .options import Options

__all__ = ["Earlier", "choose_budget", "choose_layers", "choose_rank", "choose_spec"]


@dataclass(frozen=True)
class Earlier:
    """
    What earlier runs did to the model.

    :param layers: those that are linearized, by decoder layer index
    :param report: theirs, if it was found
    """

    layers: Mapping[int, LinearizedLayer]
    report: NBLReport | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Earlier:
        """
        Return what is known of a model.

        :param model: the causal language model, linearized or not
        """
        if not isinstance(model.config, NBLConfigMixin):
            return cls({}, None)
        return cls(model.config.linearized_layers(), saving.report_of(model))

    def kv_caches(
        self, model: PreTrainedModel, architecture: Architecture
    ) -> tuple[KVCache, KVCache]:
        """
        Return the KV cache of the model as it is, and before any layer was linear.

        :param model: the causal language model
        :param architecture: its family
        :raises ValueError: if its configuration does not tell the sizes
        """
        config = {**model.config.to_dict(), "dtype": str(model.dtype).split(".")[-1]}
        total = len(decoder_layers(model, architecture))
        base = KVCache.of_base_model(config, total)
        return base.without(self.layers), base


def choose_layers(
    options: Options, model: PreTrainedModel, architecture: Architecture
) -> dict[int, str]:
    """
    Return the layers to measure: names of what may be replaced, by index.

    :param options: the recipe's
    :param model: the causal language model
    :param architecture: its family
    :raises ValueError: if there are none, or a layer that the recipe names is not among
        them
    """
    found = candidate_layers(
        model, architecture, options.targets, options.ignore, options.kind
    )
    if options.layers is None:
        return found
    missing = [index for index in options.layers if index not in found]
    if missing:
        raise ValueError(
            f"NBLModifier.layers: {missing} are not among the layers to choose "
            f"from, {sorted(found)}."
        )
    return {index: found[index] for index in options.layers}


def choose_budget(
    options: Options,
    candidates: Collection[int],
    caches: Callable[[], tuple[KVCache, KVCache]],
    context: int,
) -> Budget:
    """
    Return when to stop replacing layers.

    :param options: the recipe's
    :param candidates: decoder layers to choose from
    :param caches: returns the KV cache of the model as it is, and of the base model
    :param context: tokens of a sequence that it is counted for
    :raises ValueError: naming the field, if there are not so many layers, or they do
        not free so much
    """
    if options.ranks_only:
        return Budget(0, "ranked only")
    limits: dict[str, Any] = {
        "max_nmse": options.max_nmse,
        "max_perplexity_increase": options.max_perplexity_increase,
    }
    if options.layers is not None:
        return Budget(len(candidates), "named in layers", **limits)
    reduction = options.kv_cache_reduction
    if reduction is None:
        count, reason = count_layers(options.num_layers, len(candidates))
        return Budget(count, reason, **limits)
    try:
        cache, base = caches()
    except ValueError as err:
        raise ValueError(
            f"NBLModifier.kv_cache_reduction: {err} Use num_layers."
        ) from err
    count, reason, quota = count_for_kv_cache(
        reduction, cache, base=base, available=candidates, length=context
    )
    if len(quota) > 1:
        kinds = {index: cache.layers[index] for index in candidates}
        limits |= {"quota": quota, "kinds": kinds}
    return Budget(count, reason, **limits)


def choose_spec(
    options: Options,
    model: PreTrainedModel,
    architecture: Architecture,
    names: Collection[str],
    count: int,
) -> LinearizedLayer:
    """
    Return what is done to each layer that is chosen.

    :param options: the recipe's
    :param model: the causal language model
    :param architecture: its family
    :param names: of the modules that may be replaced
    :param count: how many of them are, at most
    :raises ValueError: naming the field that does not fit the model
    :raises NotImplementedError: for a map from weights that the family has not
    """
    total = len(decoder_layers(model, architecture))
    reads = options.input
    if options.method == "drop":
        # Whether the norm in front goes, too: not if the MLP reads it.
        gone = options.kind == "block" or "residual" in architecture.inputs
        reads = "residual" if gone else "normalized"
        if options.kind == "block" and count == total:
            raise ValueError(
                f"NBLModifier: method drop, kind block would leave none of the "
                f"{total} layers. Replace fewer."
            )
    elif options.kind == "attention":
        check_input(architecture, options.input)
    if options.method == "wo_wv":
        for name in names:
            check_weights_map(name, model.get_submodule(name), architecture)
    rank = choose_rank(model.config.get_text_config().hidden_size, options.rank)
    return LinearizedLayer(reads, options.kind, options.replaced_by, rank)


def choose_rank(hidden_size: int, rank: float | None) -> int | None:
    """
    Return the rank of each linear layer; None for full rank.

    :param hidden_size: d
    :param rank: an integer, or a fraction of ``hidden_size``; or None
    :raises ValueError: naming the recipe's field, if there is no such rank
    """
    d = hidden_size
    if rank is None:
        return None
    if isinstance(rank, int):
        if rank > d:
            raise ValueError(
                f"NBLModifier.rank: the model's hidden size is {d}, got {rank}. Use a "
                "lower rank, or none for full rank."
            )
        return rank
    return max(1, round(rank * d))
