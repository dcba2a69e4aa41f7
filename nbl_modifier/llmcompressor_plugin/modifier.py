"""NBLModifier: Neural Block Linearization as an llm-compressor modifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from llmcompressor.args import DatasetArguments
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.utils.helpers import calibration_forward_context
from loguru import logger
from pydantic import (
    Field,
    PrivateAttr,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from nbl_modifier.architectures import Architecture
from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.cost import Cost, Progress, duration
from nbl_modifier.calibration.forward import PartialForward, recomputes
from nbl_modifier.calibration.layers import MeasuredLayers
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.phases import Settings
from nbl_modifier.calibration.progress import ProgressLine, cost_of, num_windows
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.criteria import CRITERIA, TRIED
from nbl_modifier.hf.checkpoint import check_output_directory, convert_in_place
from nbl_modifier.hf.configuration_nbl import LinearizedLayer, NBLConfigMixin
from nbl_modifier.hf.modeling_nbl import decoder_layers
from nbl_modifier.kv_cache import KVCache
from nbl_modifier.layer_statistics.sources import Needs, Sources, open_sources
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.layer_statistics.windows import CalibrationData, rewind_generator
from nbl_modifier.numerics.products import FastProducts
from nbl_modifier.records.compression import FORMAT_VERSION, LayerResult, NBLReport
from nbl_modifier.records.provenance import collect_versions, utc_timestamp
from nbl_modifier.replacement.candidates import (
    candidate_layers,
    check_input,
    check_model,
)
from nbl_modifier.replacement.realize import check_weights_map
from nbl_modifier.replacement.surgery import drop_restored_norms, replace
from nbl_modifier.report.tables import ranking_table
from nbl_modifier.search.budget import (
    Budget,
    count_for_kv_cache,
    count_layers,
    explain,
    frees_nothing,
)
from nbl_modifier.search.distillation import FEW_WINDOWS, RATES
from nbl_modifier.search.find import SearchOptions, find_replacements
from nbl_modifier.search.outcome import Effect, Outcome

from . import saving, smoothing
from .followers import Followers, refuse_earlier
from .options import check_options, check_pattern, choose_rank, refuse_boolean, why_idle
from .upstream import (
    FusedAttention,
    batch_in_flight,
    hide_bars,
    keep_causal_mask,
    observe_queries,
    release_causal_mask,
    running_oneshot,
    show_bars,
    windows_of,
)

__all__ = ["NBLModifier"]

# Read from the rows, so that a new criterion is known here by itself.
if TYPE_CHECKING:
    CriterionName = str
else:
    CriterionName = Literal[tuple(CRITERIA)]

# Fields that a preset sets; how they were found is in docs/selection.md.
_PRESETS: dict[str | None, dict[str, Any]] = {
    "best": {
        "criterion": "kl_angle",
        "selection": "greedy",
        "distill_epochs": 4,
        "input": "normalized",
    },
}


class NBLModifier(Modifier):
    """
    Replace the layers that behave almost linearly by one linear map each, or by none.

    Neural Block Linearization, arXiv:2505.21077. For an attention layer with input X
    and output Y the replacement is the LMMSE estimator ``y = W x + b`` with
    ``W = C_yx C_xx^-1`` and ``b = E[y] - W E[x]``, from calibration activations
    (Algorithm 1). Layers are ranked by the CCA bound on their linearization error,
    ``sum_i (1 - rho_i^2)`` with rho the canonical correlations of the residual stream
    before and after attention (Algorithm 2), or by the error itself; the lowest are
    replaced. A replaced layer has no KV cache.

    Lifecycle:

    - on_initialize: check recipe, model, data and output directory
    - on_calibration_start: register hooks on attention and its input norm
    - on_sequential_epoch_end: solve the finished layers, free their statistics
    - on_calibration_end: rank, replace, let later modifiers see the new model
    - on_finalize: turn model and configuration into their linearized classes

    ```yaml
    default_stage:
      default_modifiers:
        NBLModifier: {num_layers: 12}
        GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head]}
    ```

    :param num_layers: how many layers to replace, the best-ranked ones
    :param layers: the decoder layers to replace, by index from 0, instead of
        ``num_layers``; only these are measured
    :param kv_cache_reduction: the part of the base model's KV cache to free at least,
        in (0, 1], instead of ``num_layers``: of K layers, all alike, the best-ranked
        ``ceil(kv_cache_reduction * K)``, those of earlier runs included. Of layers of
        several kinds, as many of each as free so much in vLLM
    :param kv_cache_context: tokens of a sequence that its KV cache is counted for, the
        model's maximum if not given; where all layers are alike, it makes no difference
    :param max_nmse: replace only layers whose linear map has at most this NMSE on
        held-out tokens; alone, all of them
    :param max_perplexity_increase: replace layers, in the order of the ranking, as
        long as perplexity on held-out windows is at most ``1 + this`` times the base
        model's; both may be combined with ``num_layers`` or ``kv_cache_reduction``,
        which is then the most to replace
    :param targets: names, ``re:`` patterns or class names of the attention modules, or
        decoder layers, that may be replaced; all of the decoder if not given
    :param ignore: the same, of those to keep
    :param criterion: what layers are ranked by, lowest first: ``cca_bound`` (the
        paper's), ``nmse``, the unexplained part of the attention output's variance,
        ``residual_nmse``, the same over the variance of the residual stream after
        attention, ``cosine``, one minus the mean cosine similarity of the stream before
        and after attention, or, measured on held-out windows when that layer alone is
        replaced, ``loss``, the increase of the mean negative log-likelihood, ``kl``,
        the divergence of the next-token distributions from the original model's, or
        ``kl_angle``, that times the angle by which attention turns the stream
    :param selection: rank once (``one_shot``, the paper's), or again after each
        replacement, on the partly linear model (``greedy``)
    :param refit: fit the chosen layers again, in order of depth, to lead from the
        linearized model's residual stream to the original one's
    :param distill_epochs: after all fits, train the maps and the gains of the norms,
        and nothing else, at most so often over the calibration windows, until the model
        predicts as the original one did; 0 leaves both as they are
    :param distill_rate: learning rate of that: by how much one step may change an
        output of a map at most, over its standard deviation; dimensionless. Found on
        held-out windows if not given
    :param kind: what is replaced: ``attention``, or the whole transformer ``block``,
        its MLP and norms included
    :param method: by what: a ``linear`` map, or nothing (``drop``). Without a block the
        model is one layer shorter: if no layer is linear, the checkpoint is one of the
        base model's class, which needs nothing of this package
    :param estimator: where the linear map comes from: ``lmmse``, fitted to the
        calibration data, or ``wo_wv``, the product of attention's own output and value
        projections (Puzzle's initialisation, arXiv:2411.19146), with
        ``input: normalized``; data then only ranks the layers
    :param rank: rank of the linear maps, each two thin layers then (reduced-rank
        regression): an integer, or a fraction of the hidden size; full if not given
    :param max_parameters: weights that all linear maps together may have, instead of
        ``rank``
    :param input: what the linear layer reads: the ``residual`` stream (the paper's; the
        input norm is folded into the map and removed) or the output of the input norm
        (``normalized``). No matter where nothing is put in place
    :param preset: ``best`` fills in the settings that keep most of the model's quality,
        see docs/selection.md, for fields that are not given and have a meaning here
    :param dampening_frac: added to the diagonal of C_xx, as a fraction of its mean;
        dimensionless, >= 0. A singular C_xx is dampened further, which is reported
    :param canonical_correlations: whether the report holds quantiles of each layer's
        canonical correlations, which takes an SVD per layer
    :param save_statistics: folder for the statistics of every layer, about
        ``32 d^2`` bytes each (56 with the input norm's output); a calibration that
        was interrupted goes on at the layer where it stopped
    :param statistics: folder that such a run wrote, to be used instead of calibrating:
        any other budget, criterion or dampening in the time it takes to solve
    """

    num_layers: int | None = Field(default=None, ge=1)
    layers: list[int] | None = None
    kv_cache_reduction: float | None = Field(default=None, gt=0.0, le=1.0)
    kv_cache_context: int | None = Field(default=None, ge=1, le=2**31)
    max_nmse: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    max_perplexity_increase: float | None = Field(
        default=None, ge=0.0, allow_inf_nan=False
    )
    targets: list[str] | None = None
    ignore: list[str] = Field(default_factory=list)
    criterion: CriterionName = "cca_bound"
    selection: Literal["one_shot", "greedy"] = "one_shot"
    refit: bool = False
    distill_epochs: int = Field(default=0, ge=0)
    distill_rate: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    kind: Literal["attention", "block"] = "attention"
    method: Literal["linear", "drop"] = "linear"
    estimator: Literal["lmmse", "wo_wv"] = "lmmse"
    rank: StrictInt | StrictFloat | None = None
    max_parameters: int | None = Field(default=None, ge=1)
    input: Literal["residual", "normalized"] = "residual"
    preset: Literal["best"] | None = None
    dampening_frac: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    canonical_correlations: bool = False
    save_statistics: str | None = None
    statistics: str | None = None

    # A property of the class, not a choice: kept out of recipe.yaml.
    requires_calibration_data: bool = Field(default=True, exclude=True)

    _filled_in: set[str] = PrivateAttr(default_factory=set)
    _architecture: Architecture = PrivateAttr()
    _spec: LinearizedLayer = PrivateAttr()
    _candidates: dict[int, str] = PrivateAttr(default_factory=dict)
    _earlier: dict[int, LinearizedLayer] = PrivateAttr(default_factory=dict)
    _earlier_report: NBLReport | None = PrivateAttr(default=None)
    _followers: Followers | None = PrivateAttr(default=None)
    _dataset_args: DatasetArguments | None = PrivateAttr(default=None)
    _propagate_error: bool = PrivateAttr(default=True)
    _fused_attention: FusedAttention | None = PrivateAttr(default=None)
    _products: FastProducts | None = PrivateAttr(default=None)
    _generator_state: Tensor = PrivateAttr()
    _data: CalibrationData | None = PrivateAttr(default=None)
    _store: StatisticsStore | None = PrivateAttr(default=None)
    _num_samples: int = PrivateAttr(default=0)
    _held_out: frozenset[int] = PrivateAttr(default=frozenset())
    _budget: Budget = PrivateAttr()
    _line: ProgressLine = PrivateAttr(default_factory=ProgressLine)
    _progress: Progress = PrivateAttr()
    _passed: set[int] = PrivateAttr(default_factory=set)
    _calibration: Calibration | None = PrivateAttr(default=None)
    _report: NBLReport | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        own = [name for name in cls.model_fields if name not in Modifier.model_fields]
        # start, end, update and index are of training schedules, the rest is of the
        # lifecycle; llm-compressor gives the group.
        unknown = sorted(map(str, set(fields) - {*own, "group"}))
        if unknown:
            raise ValueError(
                f"NBLModifier has no field {', '.join(unknown)}. Its fields: "
                f"{', '.join(own)}."
            )
        return fields

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if cls.model_fields[info.field_name].annotation is not bool:
            refuse_boolean(value)
        return value

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: list[int] | None) -> list[int] | None:
        if layers is None:
            return None
        if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise ValueError(
                "must be distinct decoder layer indices >= 0, at least one, got "
                f"{layers}."
            )
        return sorted(layers)

    @field_validator("rank")
    @classmethod
    def _check_rank(cls, rank: float | None) -> float | None:
        if rank is None or (isinstance(rank, int) and rank >= 1) or 0 < rank < 1:
            return rank
        raise ValueError(
            "must be an integer >= 1, or a fraction of the hidden size between 0 and "
            f"1, got {rank}. Without a linear map: method: drop."
        )

    @field_validator("targets", "ignore")
    @classmethod
    def _check_patterns(cls, patterns: list[str] | None) -> list[str] | None:
        check_pattern(patterns or [])
        return patterns

    @field_validator("statistics", "save_statistics")
    @classmethod
    def _check_folder(cls, folder: str | None) -> str | None:
        if folder is not None and (not folder.strip() or "\0" in folder):
            raise ValueError(f"must name a folder, got {folder!r}. Give its path.")
        return folder

    @model_validator(mode="after")
    def _fill_in_preset(self) -> Self:
        for name, value in _PRESETS.get(self.preset, {}).items():
            given = name in self.model_fields_set
            if why_idle(name, value, self._values) is not None:
                if given and self.layers is not None:
                    self._restore_default(name)
            elif not given:
                setattr(self, name, value)
                self._filled_in.add(name)
            elif getattr(self, name) != value:
                logger.info(
                    "NBLModifier.{}: {!r} as given, not {!r} of preset {!r}",
                    name,
                    getattr(self, name),
                    value,
                    self.preset,
                )
        return self

    def _restore_default(self, name: str) -> None:
        """Undo what an earlier version wrote into the recipe that it saved."""
        default, found = type(self).model_fields[name].default, getattr(self, name)
        if found != default:
            setattr(self, name, default)
            logger.warning(
                "NBLModifier.{}: {!r} of preset {!r} chooses among layers, and layers "
                "says which they are, so it is left out",
                name,
                found,
                self.preset,
            )

    @property
    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        fields = type(self).model_fields
        defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in fields.items()
        }
        check_options(self._values, defaults)
        return self

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        ways = ("num_layers", "layers", "kv_cache_reduction")
        limits = (self.max_nmse, self.max_perplexity_increase)
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1 or (not given and limits == (None, None)):
            raise ValueError(
                "NBLModifier needs one of num_layers (how many layers to "
                "replace), layers (which ones) and kv_cache_reduction (the part of the "
                "KV cache to free), or a limit, max_nmse or max_perplexity_increase, "
                f"got {' and '.join(given) or 'neither'}."
            )
        if self.statistics is not None and self.save_statistics is not None:
            raise ValueError(
                "NBLModifier.statistics says where to read statistics and "
                "save_statistics where to write them. Give one of the two."
            )
        return self

    @property
    def report(self) -> NBLReport | None:
        """What was measured and decided, once calibration has ended."""
        return self._report

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        Check everything that can be checked before calibration.

        :param state: session state with the model and the calibration data
        :raises ValueError: for a field or calibration set that does not fit the model
        :raises NotImplementedError: for an unsupported architecture, recipe or run
        :raises OSError: if the output directory cannot take the checkpoint
        """
        model: PreTrainedModel = state.model
        oneshot = running_oneshot()
        if oneshot is not None:
            self._dataset_args = oneshot.dataset_args
        self._followers = self._check_recipe(model, kwargs)
        self._architecture = check_model(model)
        if "input" in self._filled_in and self.input not in self._architecture.inputs:
            (self.input,) = self._architecture.inputs
            logger.info("NBLModifier.input: {!r}, what this family has", self.input)
        if isinstance(model.config, NBLConfigMixin):
            self._earlier = model.config.linearized_layers()
            self._earlier_report = saving.report_of(model)
        self._candidates = self._choose_from(model)
        self._spec = self._choose_spec(model)
        self._open_sources(state)
        if oneshot is not None and oneshot.output_dir is not None:
            check_output_directory(oneshot.output_dir, self._architecture)
        keep_causal_mask()
        self._fused_attention = FusedAttention(model)
        self._products = FastProducts()
        if self._progress.cost.phases:
            logger.info("NBL will take about {}", self._progress.cost)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Register the hooks that stream activations into statistics.

        :raises ValueError: if other modifiers share this calibration pass
        """
        sharing = [
            m for m in active_session().lifecycle.recipe.modifiers if m is not self
        ]
        _refuse_shared_pass(sharing)
        if self._dataset_args is not None:
            # Nothing changes during this pass, so running every layer a second time
            # to propagate the change would only double its cost. The pipeline reads
            # the argument layer by layer; on_calibration_end restores it.
            self._propagate_error = self._dataset_args.propagate_error
            self._dataset_args.propagate_error = False
        # The pipeline draws this pass's samples next. Later passes draw what they would
        # have drawn: on_calibration_end puts the generator back.
        self._generator_state = rewind_generator()
        # Any layer may turn out to be chosen, unless these scores alone decide.
        greedy = self.selection == "greedy"
        all_of_them = self._holds_out or greedy or bool(self._budget.quota)
        self._calibration = self._new_calibration(
            state.model,
            len(self._candidates) if all_of_them else self._budget.num_layers,
            store=self._store,
        )
        for index in self._candidates:
            self._calibration.watch(
                index, self.register_hook, partial(batch_in_flight, state)
            )
        assert self._fused_attention is not None
        self._fused_attention.switch_on()
        # Until the end of the run: the passes of later modifiers are as slow otherwise.
        assert self._products is not None
        self._products.switch_on()
        hide_bars()

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """
        Solve the layers among ``modules`` and free their statistics.

        :param modules: what the pipeline has finished calibrating
        :raises ValueError: naming the layer, if it saw too few tokens
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        assert self._calibration is not None
        self._calibration.solve_finished(modules)
        finished = set(map(id, modules))
        passed = {
            index
            for index, layer in enumerate(
                decoder_layers(state.model, self._architecture)
            )
            if not finished.isdisjoint(map(id, layer.modules()))
        }
        new = len(passed - self._passed)
        self._passed |= passed
        self._progress.ran(new * self._progress.cost.windows)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Choose layers, replace them, and let later modifiers resolve the new model.

        :raises RuntimeError: if a layer was never reached by calibration data
        """
        self.remove_hooks()
        show_bars()
        torch.random.set_rng_state(self._generator_state)
        if self._dataset_args is not None:
            self._dataset_args.propagate_error = self._propagate_error
        calibration, self._calibration = self._calibration, None
        assert calibration is not None
        calibration.finish()
        unseen = [
            n for i, n in self._candidates.items() if i not in calibration.measured
        ]
        if unseen:
            raise RuntimeError(
                f"{unseen[0]}: no activations were seen ({len(unseen)} such layers). "
                "Attention must run as a module: set sequential_targets to the decoder "
                "layer class, or leave it unset."
            )
        model: PreTrainedModel = state.model
        passes, held_out = None, frozenset[int]()
        if self._data is not None:
            keep, held_out = len(self._candidates), self._data.held_out
            passes = Passes(
                PartialForward(model, self._architecture, self._progress),
                self._architecture,
                windows_of(state, self._data),
                partial(self._new_calibration, model, keep, log_level="DEBUG"),
            )
        # The basic pipeline has left this context by now.
        with calibration_forward_context(model):
            outcome = find_replacements(
                calibration, self._search_options, passes, held_out
            )
        self._line.close()
        logger.info(
            "NBL: {:.1f} forward passes in {}",
            self._progress.passes,
            duration(self._progress.seconds),
        )
        self._switch_off_fused_attention()
        report = self._report = self._make_report(model, calibration, outcome)
        logger.info("NBL ranking\n{}", ranking_table(report))
        self._put_in_place(state, outcome)

    def _put_in_place(self, state: State, outcome: Outcome) -> None:
        """Replace the layers that were chosen, and tell all who have to know."""
        assert self._report is not None
        binding = self._report.binding
        logger.info("NBL replaces {}: {}", sorted(outcome.replacements), binding)
        model: PreTrainedModel = state.model
        self._warn_if_nothing_is_freed(model, outcome.replacements)
        layers = decoder_layers(model, self._architecture)
        replace(layers, self._architecture, outcome.replacements)
        # From here on the model must not be saved as what it no longer is, not even
        # if a later modifier fails.
        saving.publish(
            model,
            self._architecture,
            report=lambda: self._report,
            before=partial(self._convert, model),
        )
        if self._followers is not None:
            mixed = smoothing.MixedModel(model, self._architecture, self._linearized)
            self._followers.refresh(state, mixed)

    def _warn_if_nothing_is_freed(
        self, model: PreTrainedModel, replaced: Collection[int]
    ) -> None:
        assert self._report is not None
        if self._report.kv_cache_left is None:
            return
        cache, _ = self._kv_caches(model)
        length = self._context(model)
        nothing = frees_nothing(cache, replaced, self._candidates, length)
        if nothing is not None:
            logger.warning("NBL: {}", nothing)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Make model and configuration those of a linearized checkpoint."""
        # llm-compressor also finalizes the modifiers of a run that failed before.
        self.remove_hooks()
        show_bars()
        self._line.close()
        self._switch_off_fused_attention()
        if self._products is not None:
            self._products.switch_off()
        release_causal_mask()
        self._calibration = None
        if self._report is not None:
            layers = decoder_layers(state.model, self._architecture)
            if len(layers) == self._report.num_hidden_layers:  # none is gone yet
                for index, spec in self._linearized.items():
                    drop_restored_norms(layers[index], self._architecture, spec)
            self._convert(state.model)
            if self._followers is not None:
                self._followers.restore_mappings()
            recipe = active_session().lifecycle.recipe.yaml()
            self._report = dataclasses.replace(self._report, recipe=recipe)
        return True

    def _switch_off_fused_attention(self) -> None:
        if self._fused_attention is not None:
            self._fused_attention.switch_off()
            self._fused_attention = None

    def _open_sources(self, state: State) -> None:
        """Decide what to measure, and on what."""
        needs = Needs(
            kind=self.kind,
            input=self._spec.input,
            heldout_nmse=self.max_nmse is not None,
            losses=self._measures_losses,
            windows=self.runs_again,
        )
        try:
            sources = open_sources(
                state.model,
                state.data.calib,
                self._candidates,
                needs,
                statistics=self.statistics,
                save_statistics=self.save_statistics,
            )
        except OSError as err:
            name = "save_statistics" if self.statistics is None else "statistics"
            raise OSError(
                f"NBLModifier.{name}: {getattr(self, name)!r} cannot be used as a "
                f"folder ({err.strerror or err}). Choose another one."
            ) from err
        self._store = sources.store
        self._num_samples = sources.data.num_samples
        self._held_out = sources.data.held_out
        if self._holds_out or self.runs_again:
            self._data = sources.data
            if not self._holds_out:
                self._data = dataclasses.replace(sources.data, held_out=frozenset())
        if sources.complete:  # the pipeline will not look at the data for us
            masks = [b["loss_mask"] for b in sources.data.batches if "loss_mask" in b]
            state.loss_masks = masks or None
        self._progress = Progress(self._cost(state.model, sources), self._line)
        # llm-compressor runs the model over the data only where a modifier asks for it.
        self.requires_calibration_data = not sources.complete

    def _cost(self, model: PreTrainedModel, sources: Sources) -> Cost:
        """Return what the run is going to cost."""
        layers, data = decoder_layers(model, self._architecture), sources.data
        longest = max((b["input_ids"].shape[-1] for b in data.batches), default=0)
        settings = Settings(
            num_layers=len(layers),
            windows=num_windows(data),
            held_out=num_windows(data, held_out=True) if self._holds_out else 0,
            candidates=sorted(self._candidates),
            count=self._budget.num_layers,
            tried=self.criterion in TRIED,
            limited=self.max_perplexity_increase is not None,
            greedy=self.selection == "greedy",
            refit=self.refit,
            epochs=self.distill_epochs,
            rates=0 if self.distill_rate is not None else len(RATES),
            few=FEW_WINDOWS,
            recomputes=recomputes(model, longest),
            measures=not sources.complete,
        )
        return cost_of(
            model,
            layers,
            data,
            settings,
            normalized=self._spec.input == "normalized",
            kept_apart=self._holds_out or self._store is not None,
            stored=self._store is not None,
        )

    def _check_recipe(
        self, model: PreTrainedModel, kwargs: dict[str, Any]
    ) -> Followers | None:
        recipe: list[Modifier] = active_session().lifecycle.recipe.modifiers
        position = next((i for i, m in enumerate(recipe) if m is self), None)
        if position is None:  # initialized by hand, outside of a recipe
            return None
        earlier, later = recipe[:position], recipe[position + 1 :]
        if any(isinstance(modifier, NBLModifier) for modifier in earlier):
            raise ValueError(
                "the recipe has two NBLModifiers, and the second would rank layers of "
                "a model that the first is about to change. Use one."
            )
        refuse_earlier(earlier)
        self._check_pipeline([*earlier, *later])
        return Followers(later, model, kwargs)

    def _check_pipeline(self, others: Sequence[Modifier]) -> None:
        if self._dataset_args is None:
            return
        pipeline = str(self._dataset_args.pipeline).lower()
        if pipeline == "datafree" and self.statistics is None:
            raise ValueError(
                "NBLModifier needs calibration data, which pipeline='datafree' does "
                "not pass. Use oneshot(pipeline='independent'), the default."
            )
        # Asked again when calibration starts: not every run is oneshot's.
        if pipeline != "independent":
            _refuse_shared_pass(others)

    def _choose_from(self, model: PreTrainedModel) -> dict[int, str]:
        """Return the layers to measure, names of what may be replaced by index."""
        found = candidate_layers(
            model, self._architecture, self.targets, self.ignore, self.kind
        )
        limits: dict[str, Any] = {
            "max_nmse": self.max_nmse,
            "max_perplexity_increase": self.max_perplexity_increase,
        }
        if self.layers is not None:
            missing = [index for index in self.layers if index not in found]
            if missing:
                raise ValueError(
                    f"NBLModifier.layers: {missing} are not among the layers to choose "
                    f"from, {sorted(found)}."
                )
            found = {index: found[index] for index in self.layers}
            count, reason = len(found), "named in layers"
        elif self.kv_cache_reduction is None:
            count, reason = count_layers(self.num_layers, len(found))
        else:
            try:
                cache, base = self._kv_caches(model)
            except ValueError as err:
                raise ValueError(
                    f"NBLModifier.kv_cache_reduction: {err} Use num_layers."
                ) from err
            count, reason, quota = count_for_kv_cache(
                self.kv_cache_reduction,
                cache,
                base=base,
                available=found,
                length=self._context(model),
            )
            if len(quota) > 1:
                limits |= {
                    "quota": quota,
                    "kinds": {index: cache.layers[index] for index in found},
                }
        self._budget = Budget(count, reason, **limits)
        return found

    def _kv_caches(self, model: PreTrainedModel) -> tuple[KVCache, KVCache]:
        """
        Return the KV cache of the model as it is, and before any layer was linear.

        :raises ValueError: if its configuration does not tell the sizes
        """
        config = {**model.config.to_dict(), "dtype": str(model.dtype).split(".")[-1]}
        total = len(decoder_layers(model, self._architecture))
        base = KVCache.of_base_model(config, total)
        return base.without(self._earlier), base

    def _context(self, model: PreTrainedModel) -> int:
        """Return the tokens of a sequence that the KV cache is counted for."""
        text_config = model.config.get_text_config()
        return self.kv_cache_context or text_config.max_position_embeddings

    def _kv_cache_left(
        self, model: PreTrainedModel, replaced: Collection[int]
    ) -> float | None:
        """
        Return what is left of the KV cache of a sequence, over the base model's.

        None if the sizes are not known.
        """
        try:
            cache, base = self._kv_caches(model)
        except ValueError as err:
            logger.warning("NBL: how much KV cache is freed is not known: {}", err)
            return None
        length = self._context(model)
        return cache.without(replaced).allotted(length) / base.allotted(length)

    def _choose_spec(self, model: PreTrainedModel) -> LinearizedLayer:
        """Return what is done to each layer that is chosen."""
        architecture, num_layers = self._architecture, self._budget.num_layers
        total = len(decoder_layers(model, architecture))
        reads = self.input
        if self.method == "drop":
            # Whether the norm in front goes, too: not if the MLP reads it.
            gone = self.kind == "block" or "residual" in architecture.inputs
            reads = "residual" if gone else "normalized"
            if self.kind == "block" and num_layers == total:
                raise ValueError(
                    f"NBLModifier: method drop, kind block would leave none of the "
                    f"{total} layers. Replace fewer."
                )
        elif self.kind == "attention":
            check_input(architecture, self.input)
        if self.estimator == "wo_wv":
            for name in self._candidates.values():
                check_weights_map(name, model.get_submodule(name), architecture)
        rank = choose_rank(
            model.config.get_text_config().hidden_size,
            num_layers,
            self.rank,
            self.max_parameters,
        )
        if rank is not None and self._followers is not None:
            name = next(iter(self._candidates.values()))
            self._followers.refuse_groups(rank, f"{name}.linear")
        return LinearizedLayer(reads, self.kind, self.method, rank)

    @property
    def runs_again(self) -> bool:
        """Whether the model runs over all calibration windows more than once."""
        greedy = self.selection == "greedy"
        return greedy or self.refit or self.distill_epochs > 0

    @property
    def _holds_out(self) -> bool:
        """Whether something is measured on windows that are not fitted on."""
        return self.max_nmse is not None or self._measures_losses

    @property
    def _measures_losses(self) -> bool:
        """Whether the model runs over windows that are not fitted on."""
        limited = self.max_perplexity_increase is not None
        return self.criterion in TRIED or limited or self.distill_epochs > 0

    @property
    def _search_options(self) -> SearchOptions:
        return SearchOptions(
            criterion=self.criterion,
            budget=self._budget,
            greedy=self.selection == "greedy",
            refit=self.refit,
            distill_epochs=self.distill_epochs,
            distill_rate=self.distill_rate,
        )

    def _new_calibration(
        self,
        model: PreTrainedModel,
        keep: int,
        streams: Mapping[int, Tensor] | None = None,
        store: StatisticsStore | None = None,
        log_level: str = "INFO",
    ) -> Calibration:
        layers = decoder_layers(model, self._architecture)
        solver = LayerSolver(
            layers=MeasuredLayers(
                {index: layers[index] for index in self._candidates},
                self._candidates,
                self._architecture,
                self._spec,
            ),
            estimator=self.estimator,
            dampening_frac=self.dampening_frac,
            correlations=self.canonical_correlations,
            measure_held_out=self._holds_out,
        )
        return Calibration(
            solver,
            Leaderboard(self.criterion, keep),
            held_out=self._held_out,
            streams=streams,
            store=store,
            log_level=log_level,
            progress=self._progress,
        )

    def _make_report(
        self, model: PreTrainedModel, calibration: Calibration, outcome: Outcome
    ) -> NBLReport:
        measured = calibration.measured
        scores = {
            index: score if math.isfinite(score) else None
            for index, score in outcome.scores.items()
        }
        results = [
            LayerResult(
                name=self._candidates[choice.index],
                index=choice.index,
                score=scores[choice.index],
                rank=choice.rank,
                selected=choice.selected,
                reason=choice.reason,
                **dataclasses.asdict(measured[choice.index]),
                **_figures_of(outcome.trials.get(choice.index)),
            )
            for choice in explain(
                outcome.order,
                outcome.replacements,
                self.criterion,
                outcome.binding,
                outcome.unfit,
            )
        ]
        return NBLReport(
            format_version=FORMAT_VERSION,
            model=(
                self._earlier_report.model
                if self._earlier_report is not None
                else model.config._name_or_path
            ),
            model_type=self._architecture.model_type,
            num_hidden_layers=len(decoder_layers(model, self._architecture)),
            criterion=self.criterion,
            input=self._spec.input,
            selected_layers=sorted({*self._earlier, *outcome.replacements}),
            layers=results,
            num_calibration_samples=self._num_samples,
            num_tokens=max(result.num_tokens for result in results),
            calibration_seconds=calibration.seconds,
            dampening_frac=self.dampening_frac,
            recipe=None,
            versions=collect_versions(),
            created=utc_timestamp(),
            previous=self._earlier_report,
            selection=self.selection,
            refit=self.refit,
            distill_epochs=self.distill_epochs,
            binding=outcome.binding,
            heldout=outcome.heldout,
            kind=self.kind,
            method=self.method,
            estimator=self.estimator,
            rank=self._spec.rank,
            kv_cache_context=self._context(model),
            kv_cache_left=self._kv_cache_left(model, outcome.replacements),
        )

    @property
    def _linearized(self) -> dict[int, LinearizedLayer]:
        """All linearized layers, those of earlier runs included."""
        assert self._report is not None
        layers = dict.fromkeys(self._report.selected_layers, self._spec)
        return layers | self._earlier

    def _convert(self, model: PreTrainedModel) -> None:
        convert_in_place(
            model, self._architecture, self._linearized, criterion=self.criterion
        )


def _refuse_shared_pass(others: Sequence[Modifier]) -> None:
    if others:
        raise ValueError(
            f"NBLModifier shares its calibration pass with "
            f"{', '.join(type(m).__name__ for m in others)}, which would work on "
            "layers that are about to be replaced. Use "
            "oneshot(pipeline='independent'), the default."
        )


ModifierFactory.register("NBLModifier", NBLModifier)
saving.register()
smoothing.register()
observe_queries()


def _figures_of(effect: Effect | None) -> dict[str, Any]:
    """Return the fields of a layer's record that its trial gives."""
    if effect is None:
        return {}
    kl_angle = CRITERIA["kl_angle"].of(effect)
    return {"loss": effect.loss, "kl": effect.kl, "kl_angle": kl_angle}
