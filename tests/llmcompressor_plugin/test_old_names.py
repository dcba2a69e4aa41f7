# SPDX-License-Identifier: Apache-2.0
"""The names of 0.1 say what they said, with one warning that has the new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_modifier import NBLModifier
from nbl_modifier.llmcompressor_plugin.old_names import OLD_NAMES
from nbl_modifier.llmcompressor_plugin.ranking import RankingModifier
from nbl_modifier.llmcompressor_plugin.recipe_file import load_recipe

DISTILL, NORMALIZED = {"epochs": 2, "rate": 0.1}, {"input": "normalized"}


def said_of(logged: list[str]) -> list[str]:
    return [text for text in logged if "names of 0.1" in text]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"estimator": "lmmse"}, {}),
        ({"estimator": "wo_wv", **NORMALIZED}, {"method": "wo_wv", **NORMALIZED}),
        (
            {"estimator": "wo_wv", "method": "linear", **NORMALIZED},
            {"method": "wo_wv", **NORMALIZED},
        ),
        ({"estimator": "lmmse", "method": "drop"}, {"method": "drop"}),
        ({"distill_epochs": 2, "distill_rate": 0.1}, {"distill": DISTILL}),
        ({"distill_rate": 0.1, "distill_epochs": 2}, {"distill": DISTILL}),
        ({"distill_epochs": 2}, {"distill": {"epochs": 2}}),
        ({"distill_epochs": 0, "preset": "best"}, {"distill": {"epochs": 0}}),
        ({"distill_rate": 0.1, "preset": "best"}, {"distill": {"rate": 0.1}}),
        # what 0.1 saved where nothing was trained
        (
            {"distill_epochs": 0, "distill_rate": 0.4, "method": "drop"},
            {"method": "drop"},
        ),
        ({"save_statistics": "folder"}, {"statistics": "folder"}),
        ({"save_statistics": None, "statistics": "folder"}, {"statistics": "folder"}),
        ({"canonical_correlations": True}, {}),
    ],
    ids=str,
)
def test_old_names_say_what_they_said(
    old: dict[str, Any], new: dict[str, Any], logged: list[str]
) -> None:
    shared = {name: old[name] for name in ("preset",) if name in old}
    expected = NBLModifier(num_layers=1, **shared, **new)
    assert not said_of(logged)
    modifier = NBLModifier(num_layers=1, **old)
    assert modifier.model_dump() == expected.model_dump()
    (warning,) = said_of(logged)
    assert warning.startswith("NBLModifier: the next release refuses")
    for name in OLD_NAMES:
        assert (f"{name} is now {OLD_NAMES[name].now}" in warning) == (name in old)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"estimator": "ols"}, "estimator: is now part of method, got estimator: ols"),
        ({"estimator": "wo_wv", "method": "drop"}, "got estimator: wo_wv, method: dro"),
        ({"estimator": "lmmse", "method": "wo_wv"}, "estimator: lmmse, method: wo_wv"),
        (
            {"distill_epochs": 1, "distill": {"epochs": 2}},
            "distill_epochs: is now distill.*Give distill alone",
        ),
        (
            {"save_statistics": "a", "statistics": "b"},
            "got a and statistics: b. Give one of the two",
        ),
        ({"max_parameters": 1000}, "max_parameters: there is no.*got 1000. Give rank"),
        ({"distill_rate": 0.1}, "rate has no effect"),
    ],
)
def test_what_has_no_meaning_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NBLModifier(num_layers=1, **fields)


def test_a_field_of_the_class_is_no_old_name(logged: list[str]) -> None:
    assert RankingModifier(canonical_correlations=True).canonical_correlations
    assert not said_of(logged)


def test_a_recipe_file_warns_once(tmp_path: Path, logged: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "default_stage: {default_modifiers: {NBLModifier: {num_layers: 1, "
        "distill_epochs: 2, distill_rate: 0.1, estimator: lmmse}}}"
    )
    (modifier,) = load_recipe(str(path)).modifiers
    assert isinstance(modifier, NBLModifier)
    assert modifier.distill.model_dump() == DISTILL
    assert len(said_of(logged)) == 1
