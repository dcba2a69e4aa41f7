"""
What a run is going to do, decided and checked before it calibrates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from llmcompressor.core import State
from llmcompressor.entrypoints.oneshot import Oneshot
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nbl_modifier.architectures import Architecture, architecture_of
from nbl_modifier.calibration.cost import Cost
from nbl_modifier.calibration.forward import recomputes
from nbl_modifier.calibration.phases import Settings
from nbl_modifier.calibration.progress import cost_of, num_windows
from nbl_modifier.criteria import TRIED
from nbl_modifier.hf.checkpoint import check_output_directory
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.layer_statistics.sources import Needs, Sources, open_sources
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.replacement.candidates import check_model
from nbl_modifier.search.budget import Budget
from nbl_modifier.search.copying import num_repeating
from nbl_modifier.search.distillation import RATES
from nbl_modifier.search.schedule import few_windows

from .choices import Earlier, choose_budget, choose_layers, choose_spec
from .followers import Followers, check_recipe
from .options import Options

__all__ = ["Plan", "make_plan", "needs_data"]


@dataclass(frozen=True)
class Plan:
    """
    What a run does, and on what: all that does not change while it runs.

    :param architecture: the model's family
    :param earlier: what was done to the model before
    :param candidates: names of the modules to measure, by decoder layer index
    :param budget: when to stop replacing them
    :param context: tokens of a sequence that its KV cache is counted for
    :param spec: what is done to each layer that is chosen
    :param sources: what is measured on
    :param cost: of the run
    :param followers: the recipe's modifiers after this one; None outside of a recipe
    """

    architecture: Architecture
    earlier: Earlier
    candidates: Mapping[int, str]
    budget: Budget
    context: int
    spec: LinearizedLayer
    sources: Sources
    cost: Cost
    followers: Followers | None

    def linearized(self, chosen: Iterable[int]) -> dict[int, LinearizedLayer]:
        """
        Return all linearized layers by index, those of earlier runs included.

        :param chosen: decoder layers that this run replaces; others are not touched
        """
        return dict.fromkeys(chosen, self.spec) | dict(self.earlier.layers)


def make_plan(
    options: Options, state: State, oneshot: Oneshot | None, kwargs: dict[str, Any]
) -> Plan:
    """
    Decide and check all that can be before calibration, the recipe's own words first.

    :param options: a modifier of ours
    :param state: the session's, with the model and the calibration data
    :param oneshot: the call that runs it, if there is one
    :param kwargs: what ``on_initialize`` was called with
    :raises ValueError: for a field or calibration set that does not fit the model
    :raises NotImplementedError: for an unsupported architecture, recipe or run
    :raises OSError: if a folder cannot be used, or the output directory cannot take the
        checkpoint
    """
    model: PreTrainedModel = state.model
    followers = check_recipe(options, model, oneshot, kwargs)
    architecture = check_model(model)
    options.fit_to(architecture)
    earlier = Earlier.of(model)
    text_config = model.config.get_text_config()
    context = options.kv_cache_context or text_config.max_position_embeddings
    candidates = choose_layers(options, model, architecture)
    caches = partial(earlier.kv_caches, model, architecture)
    budget = choose_budget(options, candidates, caches, context)
    names = list(candidates.values())
    spec = choose_spec(options, model, architecture, names, budget.num_layers)
    if spec.rank is not None and followers is not None:
        followers.refuse_groups(spec.rank, f"{names[0]}.linear")
    sources = _open_sources(options, state, candidates, spec, oneshot)
    if oneshot is not None and oneshot.output_dir is not None:
        check_output_directory(oneshot.output_dir, architecture)
    cost = _cost(options, model, architecture, candidates, budget, spec, sources)
    return Plan(
        architecture=architecture,
        earlier=earlier,
        candidates=candidates,
        budget=budget,
        context=context,
        spec=spec,
        sources=sources,
        cost=cost,
        followers=followers,
    )


def needs_data(options: Options, config: PretrainedConfig) -> bool:
    """
    Return whether a run needs calibration data, before its model is loaded.

    :param options: the recipe's
    :param config: the model's, of a family that is supported
    :return: False if statistics of all layers that may be replaced are there, and the
        model is not to run over the data again
    :raises ValueError: if the statistics are damaged, or the model has not the layers
        that the recipe names
    """
    folder = options.statistics
    if folder is None or options.runs_again:
        return True
    folder = os.path.expanduser(folder)  # noqa: PTH111  as open_sources
    if not StatisticsStore.is_in(folder):
        return True
    store = StatisticsStore.open(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = choose_layers(options, model, architecture_of(config.model_type))
    return not all(index in store for index in layers)


def _open_sources(
    options: Options,
    state: State,
    candidates: Mapping[int, str],
    spec: LinearizedLayer,
    oneshot: Oneshot | None,
) -> Sources:
    """Return what is measured on."""
    needs = Needs(
        kind=options.kind,
        input=spec.input,
        heldout_nmse=options.max_nmse is not None,
        losses=options.measures_losses,
        windows=options.runs_again,
        loss_masks=oneshot is not None and oneshot.dataset_args.use_loss_mask,
    )
    try:
        return open_sources(
            state.model,
            state.data.calib,
            candidates,
            needs,
            folder=options.statistics,
        )
    except OSError as err:
        raise OSError(
            f"NBLModifier.statistics: {options.statistics!r} cannot be used as a "
            f"folder ({err.strerror or err}). Choose another one."
        ) from err


def _cost(
    options: Options,
    model: PreTrainedModel,
    architecture: Architecture,
    candidates: Mapping[int, str],
    budget: Budget,
    spec: LinearizedLayer,
    sources: Sources,
) -> Cost:
    """Return what the run is going to cost."""
    layers, data = decoder_layers(model, architecture), sources.data
    longest = max((b["input_ids"].shape[-1] for b in data.batches), default=0)
    per_step, ranks = options.distill.windows_per_step, Ranks()
    held_out = num_windows(data, held_out=True) if options.holds_out else 0
    settings = Settings(
        num_layers=len(layers),
        windows=num_windows(data),
        held_out=held_out,
        repeating=num_repeating(held_out) if options.copying else 0,
        candidates=sorted(candidates),
        count=budget.num_layers,
        tried=options.criterion in TRIED,
        limited=options.max_perplexity_increase is not None,
        greedy=options.selection == "greedy",
        refit=options.refit,
        epochs=options.distill.epochs,
        rates=0 if options.distill.rate is not None else len(RATES),
        few=few_windows(per_step, ranks),
        recomputes=recomputes(model, longest),
        measures=not sources.complete,
    )
    stored = sources.store is not None
    return cost_of(
        model,
        layers,
        data,
        settings,
        normalized=spec.input == "normalized",
        kept_apart=options.holds_out or stored,
        stored=stored,
    )
