"""
Fields of NBLModifier under the names that they had in 0.1.

They work for one release more, with one warning per recipe. Recipes that 0.1 saved hold
all of them, with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from loguru import logger

__all__ = ["OLD_NAMES", "translate"]

Fields = dict[str, Any]

# What 0.1 saved with every recipe, those that train nothing too.
_DEFAULT_RATE = 0.4


@dataclass(frozen=True)
class OldName:
    """
    A field that has another name now.

    :param now: what to write instead, as it ends the sentence "NAME is now ..."
    :param take_over: given the fields, without this one, and its value, has the new
        fields say the same
    """

    now: str
    take_over: Callable[[Fields, Any], None]


def translate(modifier: str, fields: Mapping[str, Any], own: Collection[str]) -> Fields:
    """
    Return the fields of a recipe under the names that they have now.

    :param modifier: name of the class, for messages
    :param fields: as the recipe has them, left as they are
    :param own: names that the class has fields of
    :raises ValueError: naming a field that is gone, has a value that it never had, or
        is there under both names
    """
    old = [name for name in OLD_NAMES if name in fields and name not in own]
    translated = {name: value for name, value in fields.items() if name not in old}
    for name in old:
        try:
            OLD_NAMES[name].take_over(translated, fields[name])
        except ValueError as err:
            raise ValueError(f"{modifier}.{name}: {err}") from err
    if old:
        logger.warning(
            "{}: the next release refuses the names of 0.1. {}.",
            modifier,
            "; ".join(f"{name} is now {OLD_NAMES[name].now}" for name in old),
        )
    return translated


def _estimator(fields: Fields, value: Any) -> None:
    method = fields.get("method", "linear")
    if value == "lmmse" and method != "wo_wv":
        return
    if value != "wo_wv" or method != "linear":
        raise ValueError(
            f"is now part of method, got estimator: {value}, method: {method}. Give "
            "method alone: linear, wo_wv or drop."
        )
    fields["method"] = "wo_wv"


def _distill(key: str, fields: Fields, value: Any) -> None:
    """Collect what was two fields; a field of the new name must not be there, too."""
    distill = fields.setdefault("distill", _Nested())
    if not isinstance(distill, _Nested):
        raise ValueError(
            f"is now distill: {{{key}: ...}}, got {value} and distill: {distill}. Give "
            "distill alone."
        )
    if distill.get("epochs") == 0 and (key, value) == ("rate", _DEFAULT_RATE):
        return
    distill[key] = value


class _Nested(Fields):
    """Fields within a field, put there by this module."""


def _statistics(fields: Fields, value: Any) -> None:
    if value is None:
        return
    if fields.get("statistics") is not None:
        raise ValueError(
            "is now statistics, which reads what is in a folder and adds what is "
            f"missing, got {value} and statistics: {fields['statistics']}. Give one of "
            "the two, as statistics."
        )
    fields["statistics"] = value


def _canonical_correlations(_fields: Fields, _value: Any) -> None:
    """They change nothing that is replaced."""


def _max_parameters(_fields: Fields, value: Any) -> None:
    raise ValueError(
        f"there is no such field any more, got {value}. Give rank: each linear map of "
        "rank r has 2 r d + d weights, d the hidden size."
    )


# In the order in which they are taken over: what 0.1 took for a rate depends on epochs.
OLD_NAMES = {
    "estimator": OldName("method: linear, wo_wv or drop", _estimator),
    "distill_epochs": OldName("distill: {epochs: ...}", partial(_distill, "epochs")),
    "distill_rate": OldName("distill: {rate: ...}", partial(_distill, "rate")),
    "save_statistics": OldName("statistics", _statistics),
    "canonical_correlations": OldName(
        "an option of nbl rank, --canonical-correlations, and passed over here",
        _canonical_correlations,
    ),
    "max_parameters": OldName("rank", _max_parameters),
}
