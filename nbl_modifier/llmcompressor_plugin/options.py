"""What a recipe says to NBLModifier: its fields, presets, and what they must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nbl_modifier.architectures import Architecture
from nbl_modifier.criteria import CRITERIA, TRIED

from .distill import Distill
from .old_names import translate
from .rules import check_options, check_pattern, refuse_boolean, why_idle

__all__ = ["Options"]

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
        "distill": Distill(epochs=4),
        "input": "normalized",
    },
}


class Options(BaseModel):
    """
    The fields of :class:`NBLModifier`.

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
    :param criterion: what layers are ranked by, lowest first; ``cca_bound`` is the
        paper's, and docs/selection.md says what each measures
    :param selection: rank once (``one_shot``, the paper's), or again after each
        replacement, on the partly linear model (``greedy``)
    :param refit: fit the chosen layers again, in order of depth, to lead from the
        linearized model's residual stream to the original one's
    :param distill: after all fits, train the maps and the gains of the norms, and
        nothing else, until the model predicts as the original one did: at most
        ``epochs`` times over the calibration windows (0 leaves both as they are), with
        the learning ``rate``, by how much one step may change an output of a map at
        most, over its standard deviation; dimensionless, found on held-out windows if
        not given. A step is taken on ``windows_per_step`` windows, a multiple of the
        number of processes, one of each if not given
    :param copying: whether trials and training are, too, on windows that say their
        first half again: what the model copies from its context, of which ordinary
        text shows little
    :param kind: what is replaced: ``attention``, or the whole transformer ``block``,
        its MLP and norms included
    :param method: by what: a ``linear`` map, fitted to the calibration data; the linear
        map ``wo_wv``, the product of attention's own output and value projections
        (Puzzle's initialisation, arXiv:2411.19146), with ``input: normalized``, where
        data only ranks the layers; or nothing (``drop``). Without a block the model is
        one layer shorter: if no layer is linear, the checkpoint is one of the base
        model's class, which needs nothing of this package
    :param rank: rank of the linear maps, each two thin layers then (reduced-rank
        regression): an integer, or a fraction of the hidden size; full if not given
    :param input: what the linear layer reads: the ``residual`` stream (the paper's; the
        input norm is folded into the map and removed) or the output of the input norm
        (``normalized``). No matter where nothing is put in place
    :param preset: ``best`` fills in the settings that keep most of the model's quality,
        see docs/selection.md, for fields that are not given and have a meaning here
    :param dampening_frac: added to the diagonal of C_xx, as a fraction of its mean;
        dimensionless, >= 0. A singular C_xx is dampened further, which is reported
    :param statistics: folder for the statistics of every layer, about ``32 d^2`` bytes
        each (56 with the input norm's output). Those that are there are used, after a
        check that they are of this model and data; missing ones are measured and added,
        so that a calibration that was interrupted goes on at the layer where it
        stopped. Without calibration data all must be there: any other budget, criterion
        or dampening in the time it takes to solve
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
    distill: Distill = Distill()
    copying: bool = False
    kind: Literal["attention", "block"] = "attention"
    method: Literal["linear", "wo_wv", "drop"] = "linear"
    rank: StrictInt | StrictFloat | None = None
    input: Literal["residual", "normalized"] = "residual"
    preset: Literal["best"] | None = None
    dampening_frac: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    statistics: str | None = None

    _filled_in: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        own = [name for name in cls.model_fields if name not in Modifier.model_fields]
        fields = translate(cls.__name__, fields, own)
        # start, end, update and index are of training schedules, the rest is of the
        # lifecycle; llm-compressor gives the group.
        unknown = sorted(map(str, set(fields) - {*own, "group"}))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}. Its fields: "
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

    @field_validator("statistics")
    @classmethod
    def _check_folder(cls, folder: str | None) -> str | None:
        if folder is not None and (not folder.strip() or "\0" in folder):
            raise ValueError(f"must name a folder, got {folder!r}. Give its path.")
        return folder

    @model_validator(mode="after")
    def _fill_in_preset(self) -> Self:
        for name, value in _PRESETS.get(self.preset, {}).items():
            given = name in self.model_fields_set
            if name == "distill" and "epochs" not in self.distill.model_fields_set:
                value = self.distill.model_copy(update={"epochs": value.epochs})
                given = False
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

    def fit_to(self, architecture: Architecture) -> None:
        """
        Let what a preset filled in be what the family has.

        :param architecture: the model's family
        """
        if "input" in self._filled_in and self.input not in architecture.inputs:
            (self.input,) = architecture.inputs
            logger.info("NBLModifier.input: {!r}, what this family has", self.input)

    @property
    def ranks_only(self) -> bool:
        """Whether no layer is to be replaced."""
        return False

    @property
    def runs_again(self) -> bool:
        """Whether the model runs over all calibration windows more than once."""
        greedy = self.selection == "greedy"
        return greedy or self.refit or self.distill.epochs > 0

    @property
    def holds_out(self) -> bool:
        """Whether something is measured on windows that are not fitted on."""
        return self.max_nmse is not None or self.measures_losses

    @property
    def measures_losses(self) -> bool:
        """Whether the model runs over windows that are not fitted on."""
        limited = self.max_perplexity_increase is not None
        return self.criterion in TRIED or limited or self.distill.epochs > 0

    @property
    def estimator(self) -> str:
        """Where linear maps come from, as reports say it: ``lmmse`` or ``wo_wv``."""
        return "wo_wv" if self.method == "wo_wv" else "lmmse"

    @property
    def replaced_by(self) -> Literal["linear", "drop"]:
        """What takes the place of a layer: a linear map wherever from, or nothing."""
        return "drop" if self.method == "drop" else "linear"

    @property
    def reports_correlations(self) -> bool:
        """Whether quantiles of the canonical correlations are asked for."""
        return False
