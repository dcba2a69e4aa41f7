# SPDX-License-Identifier: Apache-2.0
"""Which options go together, and that none is passed over without a word."""

from __future__ import annotations

from typing import Any

import pytest

from nbl_modifier import Distill, NBLModifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "wo_wv"}, "needs kind: attention and input: normalized"),
        (
            {"method": "wo_wv", "kind": "block"},
            "got kind: block, input: residual",
        ),
        ({"rank": 0}, "integer >= 1, or a fraction .* got 0.* method: drop"),
        ({"rank": 1.0}, "got 1.0"),
        ({"distill": {"rate": 0.1}}, "rate has no effect, got rate: 0.1.*give epochs"),
        ({"distill": {"windows_per_step": 2}}, "windows_per_step has no effect, got"),
        ({"copying": True}, "criterion takes no trial, and distill has no epochs, so"),
    ],
)
def test_what_does_not_go_together_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NBLModifier(num_layers=2, **fields)


DROP, WEIGHTS = {"method": "drop"}, {"method": "wo_wv", "input": "normalized"}


@pytest.mark.parametrize(
    ("others", "name", "value", "remedy"),
    [
        (DROP, "rank", 8, "method: linear"),
        (DROP, "refit", True, "method: linear"),
        (DROP, "distill", Distill(epochs=1), "method: linear"),
        (DROP, "distill", Distill(rate=0.1), "method: linear"),
        (DROP, "input", "normalized", "method: linear"),
        (DROP, "dampening_frac", 0.1, "method: linear"),
        ({"kind": "block"}, "input", "normalized", "kind: attention"),
        (WEIGHTS, "refit", True, "method: linear"),
        (WEIGHTS, "dampening_frac", 0.1, "method: linear"),
        ({"layers": [0]}, "selection", "greedy", "give num_layers"),
        ({"layers": [0]}, "criterion", "loss", "give num_layers"),
        ({"layers": [0]}, "criterion", "kl", "give num_layers"),
        ({"layers": [0]}, "max_nmse", 0.5, "give num_layers"),
        ({"layers": [0]}, "max_perplexity_increase", 0.1, "give num_layers"),
    ],
)
def test_what_has_no_effect_is_refused(
    others: dict[str, Any], name: str, value: Any, remedy: str
) -> None:
    fields = {"num_layers": 2} | others
    if "layers" in others:
        del fields["num_layers"]
    written = str(value).lower() if value is True else value
    with pytest.raises(ValueError, match="has no effect") as caught:
        NBLModifier(**fields, **{name: value})
    message = str(caught.value)
    assert f"so {name} has no effect, got {name}: {written}. Remove it, or " in message
    assert remedy in message
    NBLModifier(**fields)  # the others are fine


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": [0]},
        DROP,
        {"kind": "block"},
        WEIGHTS,
        {"kind": "block", "method": "drop", "preset": "best"},
        {"layers": [0], "preset": "best", "distill": {"epochs": 1}},
    ],
)
def test_what_is_saved_holds_nothing_without_effect(fields: dict[str, Any]) -> None:
    """Saved recipes hold all fields that are not None."""
    fields = fields if "layers" in fields else {"num_layers": 1} | fields
    modifier = NBLModifier(**fields)
    saved = {k: v for k, v in modifier.model_dump().items() if v is not None}
    for name in ("initialized_", "finalized_", "started_", "ended_"):
        saved.pop(name, None)
    assert NBLModifier(**saved).model_dump() == modifier.model_dump()
