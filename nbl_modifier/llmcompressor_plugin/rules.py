"""
Which replacements exist, and which options go together. Standard library only, so that
a recipe's mistakes show before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_modifier.criteria import TRIED

__all__ = [
    "check_budget",
    "check_options",
    "check_pattern",
    "refuse_boolean",
    "why_idle",
]


Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Idle:
    """
    Fields of NBLModifier that have no effect beside what other fields say.

    :param beside: those other fields, as a recipe says them
    :param when: whether they say so, of the values of all fields
    :param fields: what has no effect then, unless it has its default
    :param reason: why, after ``beside``
    :param remedy: what to do instead of removing it
    :param only: the values that have no effect; None for all
    """

    beside: str
    when: Callable[[Values], bool]
    fields: tuple[str, ...]
    reason: str
    remedy: str
    only: tuple[Any, ...] | None = None


# One row for each way in which an option could be passed over without a word.
_IDLE = (
    _Idle(
        "method: drop",
        lambda values: values["method"] == "drop",
        ("rank", "refit", "distill", "input", "dampening_frac"),
        "puts nothing in place of a layer",
        "use method: linear",
    ),
    _Idle(
        "kind: block",
        lambda values: values["kind"] == "block",
        ("input",),
        "replaces the input norm, too, and reads the residual stream",
        "use kind: attention",
    ),
    _Idle(
        "method: wo_wv",
        lambda values: values["method"] == "wo_wv",
        ("refit", "dampening_frac"),
        "takes the map from attention's own weights",
        "use method: linear",
    ),
    _Idle(
        "layers",
        lambda values: values["layers"] is not None,
        ("max_nmse", "max_perplexity_increase", "selection"),
        "says which layers to replace",
        "give num_layers instead of layers",
    ),
    _Idle(
        "layers",
        lambda values: values["layers"] is not None,
        ("criterion",),
        "says which layers to replace, without a measurement",
        "give num_layers instead of layers",
        only=TRIED,
    ),
    _Idle(
        "criterion",
        lambda v: v["criterion"] not in TRIED and not v["distill"].epochs,
        ("copying",),
        "takes no trial, and distill has no epochs",
        "use criterion: kl_angle or distill: {epochs: 4}",
    ),
)


def why_idle(name: str, value: Any, values: Values) -> str | None:
    """
    Return why a field of NBLModifier has no effect beside the others, or None.

    :param name: of the field
    :param value: which it has, or is to have
    :param values: of all fields, by name
    """
    for row in _IDLE:
        if (
            name in row.fields
            and (row.only is None or value in row.only)
            and row.when(values)
        ):
            return (
                f"NBLModifier.{row.beside} {row.reason}, so {name} has no effect, got "
                f"{name}: {_as_yaml(value)}. Remove it, or {row.remedy}."
            )
    return None


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_options(values: Values, defaults: Values) -> None:
    """
    Refuse options of NBLModifier that do not go together, or have no effect.

    :param values: of all fields, by name
    :param defaults: theirs
    :raises ValueError: naming the fields
    """
    for name, value in values.items():
        idle = why_idle(name, value, values) if value != defaults[name] else None
        if idle is not None:
            raise ValueError(idle)
    distill = values["distill"]
    others = {k: v for k, v in distill.model_dump().items() if k != "epochs"}
    if not distill.epochs and others:
        (name, value), *_ = others.items()
        raise ValueError(
            f"NBLModifier.distill: without epochs nothing is trained, so {name} has no "
            f"effect, got {name}: {value}. Remove it, or give epochs."
        )
    kind, reads = values["kind"], values["input"]
    if values["method"] == "wo_wv" and (kind == "block" or reads != "normalized"):
        raise ValueError(
            "NBLModifier.method: wo_wv is a map of the input norm's output, from "
            "attention's own weights. It needs kind: attention and input: normalized, "
            f"got kind: {kind}, input: {reads}. Give these, or use method: linear."
        )


def check_budget(values: Values) -> None:
    """
    Refuse none, and more than one, of what says how many layers to replace.

    :param values: of all fields, by name
    :raises ValueError: naming the fields
    """
    ways = ("num_layers", "layers", "kv_cache_reduction")
    limits = ("max_nmse", "max_perplexity_increase")
    given = [name for name in ways if values[name] is not None]
    limited = any(values[name] is not None for name in limits)
    if len(given) > 1 or not (given or limited):
        raise ValueError(
            "NBLModifier needs one of num_layers (how many layers to replace), layers "
            "(which ones) and kv_cache_reduction (the part of the KV cache to free), "
            "or a limit, max_nmse or max_perplexity_increase, got "
            f"{' and '.join(given) or 'neither'}."
        )


def refuse_boolean(value: Any) -> None:
    """
    Refuse true and false where a number or a name is wanted.

    :param value: of a field, a list of them too
    :raises ValueError: saying what to write
    """
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, bool):
            raise ValueError(
                f"true and false are no value here, got {_as_yaml(each)}. (YAML reads "
                "yes, no, on and off as these, too.) Write the number or name that is "
                "meant, or remove the field."
            )


def check_pattern(patterns: Sequence[str]) -> None:
    """
    Refuse ``re:`` patterns that are no regular expressions.

    :param patterns: names, class names and patterns
    :raises ValueError: naming the pattern
    """
    for pattern in patterns:
        if not pattern.startswith("re:"):
            continue
        try:
            re.compile(pattern.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as err:
            raise ValueError(
                f"what follows 're:' must be a regular expression, got {pattern!r} "
                f"({err}). Correct it, or leave out 're:' for a name."
            ) from err
