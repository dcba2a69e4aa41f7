# SPDX-License-Identifier: Apache-2.0
"""Statistics are used for what they are of, and for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbl_modifier.layer_statistics.origin import REMEDY, Origin

ORIGIN = Origin("some/model", "0123", "4567", 8, 1, "attention", "residual", "89ab")


@pytest.mark.parametrize("windows", ["89ab", None])
def test_fields_come_back(windows: str | None) -> None:
    origin = replace(ORIGIN, windows_digest=windows)
    assert Origin.of(origin.fields()) == origin
    assert ("windows_digest" in origin.fields()) == (windows is not None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": None}, "model=None"),
        ({"held_out": "1"}, "held_out='1'"),
        ({"windows_digest": 5}, "windows_digest=5"),
        ({"loss_masks": "yes"}, "loss_masks='yes'"),
        ({"author": "me", "kind": 1}, "author='me', kind=1"),
    ],
)
def test_other_fields_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^found {named}$"):
        Origin.of(ORIGIN.fields() | change)


@pytest.mark.parametrize(
    ("field", "value", "subject"),
    [
        ("model_digest", "f", "model some/other"),
        ("data_digest", "f", "calibration data"),
        ("windows_digest", "f", "set of held-out windows"),
        ("held_out", 2, "number of held-out sequences"),
        ("kind", "block", "kind"),
    ],
)
def test_what_differs_is_named(field: str, value: Any, subject: str) -> None:
    other: dict[str, Any] = {"model": "some/other", field: value}
    with pytest.raises(ValueError, match=f"here: taken with {field} ") as caught:
        ORIGIN.check(replace(ORIGIN, **other), "here")
    assert f"this run's {subject} has {value}. {REMEDY}" in str(caught.value)


def test_what_is_not_known_of_a_run_is_not_compared() -> None:
    """Without calibration data nothing is known of them."""
    wanted = replace(ORIGIN, data_digest="", held_out=0, windows_digest=None)
    ORIGIN.check(wanted, "here")


@pytest.mark.parametrize("found", [None, False, True])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_masks_are_compared_where_both_say(
    found: bool | None, wanted: bool | None
) -> None:
    origin = replace(ORIGIN, loss_masks=found)
    assert Origin.of(origin.fields()) == origin
    asked = replace(ORIGIN, loss_masks=wanted)
    if None in (found, wanted) or found == wanted:
        origin.check(asked, "here")
        return
    with pytest.raises(ValueError, match=f"taken with use_loss_mask={found}, ") as err:
        origin.check(asked, "here")
    assert f"run has use_loss_mask={wanted}" in str(err.value)
    assert f"Pass use_loss_mask={found}" in str(err.value)
    assert REMEDY in str(err.value)


def test_normalized_input_serves_both() -> None:
    normalized = replace(ORIGIN, input="normalized")
    normalized.check(ORIGIN, "here")
    with pytest.raises(ValueError, match="taken with input residual, which says nothi"):
        ORIGIN.check(normalized, "here")
