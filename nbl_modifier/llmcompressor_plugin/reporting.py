"""What a run says of itself: its report, and the lines of its log."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from loguru import logger
from transformers import PreTrainedModel

from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Cost, Progress, duration
from nbl_modifier.criteria import CRITERIA
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.records.compression import FORMAT_VERSION, LayerResult, NBLReport
from nbl_modifier.records.provenance import collect_versions, utc_timestamp
from nbl_modifier.report.tables import ranking_table
from nbl_modifier.search.budget import explain, frees_nothing
from nbl_modifier.search.outcome import Effect, Outcome

from .options import Options
from .plan import Plan

__all__ = ["log_choice", "log_cost", "log_ranking", "make_report"]


def make_report(
    options: Options,
    plan: Plan,
    model: PreTrainedModel,
    calibration: Calibration,
    outcome: Outcome,
) -> NBLReport:
    """
    Return what was measured and decided.

    :param options: the recipe's
    :param plan: of the run
    :param model: the causal language model, before any layer is replaced
    :param calibration: of all candidates
    :param outcome: of the search; without replacements the layers were ranked only
    """
    results = _layer_results(options, plan, calibration, outcome)
    earlier, replaced = plan.earlier, outcome.replacements
    return NBLReport(
        format_version=FORMAT_VERSION,
        model=(
            earlier.report.model
            if earlier.report is not None
            else model.config._name_or_path
        ),
        model_type=plan.architecture.model_type,
        num_hidden_layers=len(decoder_layers(model, plan.architecture)),
        criterion=options.criterion,
        input=plan.spec.input,
        selected_layers=sorted({*earlier.layers, *replaced}),
        layers=results,
        num_calibration_samples=plan.sources.data.num_samples,
        num_tokens=max(result.num_tokens for result in results),
        calibration_seconds=calibration.seconds,
        dampening_frac=options.dampening_frac,
        recipe=None,
        versions=collect_versions(),
        created=utc_timestamp(),
        previous=earlier.report,
        selection=options.selection,
        refit=options.refit,
        distill_epochs=options.distill.epochs,
        binding=outcome.binding if replaced else None,
        heldout=outcome.heldout,
        kind=options.kind,
        method=options.replaced_by,
        estimator=options.estimator,
        rank=plan.spec.rank,
        kv_cache_context=plan.context,
        kv_cache_left=_kv_cache_left(plan, model, replaced) if replaced else None,
    )


def _layer_results(
    options: Options, plan: Plan, calibration: Calibration, outcome: Outcome
) -> list[LayerResult]:
    scores = {
        index: score if math.isfinite(score) else None
        for index, score in outcome.scores.items()
    }
    return [
        LayerResult(
            name=plan.candidates[choice.index],
            index=choice.index,
            score=scores[choice.index],
            rank=choice.rank,
            selected=choice.selected,
            reason=choice.reason,
            **dataclasses.asdict(calibration.measured[choice.index]),
            **_figures_of(outcome.trials.get(choice.index)),
        )
        for choice in explain(
            outcome.order,
            outcome.replacements,
            options.criterion,
            outcome.binding,
            outcome.unfit,
        )
    ]


def _figures_of(effect: Effect | None) -> dict[str, Any]:
    """Return the fields of a layer's record that its trial gives."""
    if effect is None:
        return {}
    kl_angle = CRITERIA["kl_angle"].of(effect)
    return {"loss": effect.loss, "kl": effect.kl, "kl_angle": kl_angle}


def _kv_cache_left(
    plan: Plan, model: PreTrainedModel, replaced: Collection[int]
) -> float | None:
    """
    Return what is left of the KV cache of a sequence, over the base model's.

    None if the sizes are not known.
    """
    try:
        cache, base = plan.earlier.kv_caches(model, plan.architecture)
    except ValueError as err:
        logger.warning("NBL: how much KV cache is freed is not known: {}", err)
        return None
    length = plan.context
    return cache.without(replaced).allotted(length) / base.allotted(length)


def log_cost(cost: Cost) -> None:
    """
    Say what the run is going to take, if it runs the model or measures anything.

    :param cost: of the run
    """
    if cost.phases:
        logger.info("NBL will take about {}", cost)


def log_ranking(report: NBLReport, progress: Progress) -> None:
    """
    Say what was measured, and what it took.

    :param report: of the run
    :param progress: of the run, whose search has ended
    """
    passes, seconds = progress.passes, duration(progress.seconds)
    logger.info("NBL: {:.1f} forward passes in {}", passes, seconds)
    logger.info("NBL ranking\n{}", ranking_table(report))


def log_choice(
    report: NBLReport, plan: Plan, model: PreTrainedModel, replaced: Collection[int]
) -> None:
    """
    Say what is replaced; warn if vLLM sets aside as much KV cache as before.

    :param report: of the run
    :param plan: of the run
    :param model: the causal language model, whose configuration tells the sizes
    :param replaced: decoder layers
    """
    logger.info("NBL replaces {}: {}", sorted(replaced), report.binding)
    if report.kv_cache_left is None:  # the sizes are not known
        return
    cache, _ = plan.earlier.kv_caches(model, plan.architecture)
    nothing = frees_nothing(cache, replaced, plan.candidates, plan.context)
    if nothing is not None:
        logger.warning("NBL: {}", nothing)
