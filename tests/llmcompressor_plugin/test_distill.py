# SPDX-License-Identifier: Apache-2.0
"""How maps are trained, as a recipe says it."""

from __future__ import annotations

from typing import Any

import pytest

from nbl_modifier import Distill, NBLModifier


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"epoch": 1}, "distill has no field epoch.*Its fields: epochs, rate"),
        (4, "must hold fields, epochs, rate, windows_per_step, got 4"),
        (None, "fields, epochs, rate, windows_per_step, got None"),
        ({"epochs": True}, "true and false are no value"),
        ({"epochs": 1, "rate": False}, "true and false are no value"),
    ],
    ids=str,
)
def test_distill_is_named_fields(distill: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NBLModifier(num_layers=1, distill=distill)


def test_a_mapping_says_the_same() -> None:
    """As in a recipe. Type checkers want the class, as mypy does of this file."""
    typed = NBLModifier(num_layers=1, distill=Distill(epochs=2, rate=0.1))
    fields: dict[str, Any] = {"distill": {"epochs": 2, "rate": 0.1}}
    modifier = NBLModifier(num_layers=1, **fields)
    assert isinstance(modifier.distill, Distill)
    assert modifier.model_dump() == typed.model_dump()


def test_preset_fills_in_what_distill_leaves_open(logged: list[str]) -> None:
    fields: dict[str, Any] = {"num_layers": 1, "preset": "best"}
    epochs = NBLModifier(**fields).distill.epochs
    rated = NBLModifier(**fields, distill=Distill(rate=0.1))
    assert rated.distill == Distill(epochs=epochs, rate=0.1)
    two = NBLModifier(**fields, distill=Distill(windows_per_step=2)).distill
    assert two == Distill(epochs=epochs, windows_per_step=2)
    assert not [text for text in logged if "as given" in text]
    assert NBLModifier(**fields, distill=Distill(epochs=0)).distill == Distill()
    (said,) = [text for text in logged if "as given" in text]
    assert f"distill: {{epochs: 0}} as given, not {{epochs: {epochs}}}" in said


def test_saved_distill_leaves_out_what_is_not_given() -> None:
    """llm-compressor leaves None out of a recipe, but not of what is in a field."""
    saved = NBLModifier(num_layers=1, distill=Distill(epochs=2)).model_dump()
    assert saved["distill"] == {"epochs": 2}
    rated = NBLModifier(num_layers=1, distill=Distill(epochs=2, rate=0.1))
    assert rated.model_dump()["distill"] == {"epochs": 2, "rate": 0.1}
