# SPDX-License-Identifier: Apache-2.0
"""A report as a run would make it, for the tests of this folder."""

from nbl_modifier.report.schema import FORMAT_VERSION, LayerResult, NBLReport

# Layer number to bound: the ranking is 2, 0, 3, 1.
BOUNDS = {0: 2.5, 1: 9.0, 2: 1.25, 3: 4.0}
SELECTED = [0, 2]


def make_report(**changes: object) -> NBLReport:
    """Return a finished run on 4 layers with 2 replaced; ``changes`` are fields."""
    order = sorted(BOUNDS, key=BOUNDS.__getitem__)
    layers = [
        LayerResult(
            name=f"model.layers.{index}.self_attn",
            index=index,
            num_tokens=4096,
            nmse=bound / 10,
            residual_nmse=bound / 100,
            cca_bound=bound,
            dampening_frac=1e-6,
            score=bound,
            rank=order.index(index) + 1,
            selected=index in SELECTED,
            reason="test",
            seconds=0.5,
        )
        for index, bound in BOUNDS.items()
    ]
    fields = {
        "format_version": FORMAT_VERSION,
        "model": "some-organization/some-model",
        "model_type": "llama",
        "num_hidden_layers": 4,
        "criterion": "cca_bound",
        "input": "residual",
        "selected_layers": SELECTED,
        "layers": layers,
        "num_calibration_samples": 16,
        "num_tokens": 4096,
        "calibration_seconds": 3.0,
        "dampening_frac": 0.0,
        "recipe": "default_stage:\n  default_modifiers: {NBLModifier: {num_layers: 2}}",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "created": "2026-01-02T03:04:05+00:00",
        "evaluation": {"perplexity base": 14.5, "held-out tokens": 16320.0},
    }
    return NBLReport(**{**fields, **changes})  # type: ignore[arg-type]
