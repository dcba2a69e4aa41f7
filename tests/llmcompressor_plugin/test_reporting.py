# SPDX-License-Identifier: Apache-2.0
"""What a run reports: figures against an independent computation, warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.llmcompressor_plugin.ranking import RankingModifier
from tests.llmcompressor_plugin.test_modifier import (
    INPUTS,
    Activations,
    Kind,
    activations,
    run,
)
from tests.numerics import oracle
from tests.tiny_llama import compress, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(llama: Path, rows: Dataset) -> list[Activations]:
    return activations(llama, rows)


@INPUTS
def test_report_equals_an_independent_computation(
    llama: Path, rows: Dataset, plain: list[Activations], kind: Kind
) -> None:
    _, report = run(llama, NBLModifier(num_layers=1, input=kind), rows)
    assert [layer.index for layer in report.ranking] == sorted(
        range(4), key=lambda index: plain[index].bound
    )
    for layer in report.layers:
        seen = plain[layer.index]
        # Bound and NMSE are those of the float64 solution; 1e-9 leaves 1e-16 times the
        # condition number of 1e3 room for the orders of summation.
        assert layer.cca_bound == pytest.approx(seen.bound, rel=1e-9)
        assert layer.score == layer.cca_bound
        X, A = seen.inputs(kind), seen.output
        nmse = oracle.nmse(X, A, *oracle.lmmse(X, A))
        assert layer.nmse == pytest.approx(nmse, rel=1e-9)
        total = np.var(seen.residual + A, axis=0).sum()
        assert layer.residual_nmse == pytest.approx(
            nmse * np.var(A, axis=0).sum() / total, rel=1e-9
        )
        assert layer.dampening_frac == 0.0
        assert layer.num_tokens == len(X)


@INPUTS
def test_canonical_correlations_are_stored_on_request(
    llama: Path, rows: Dataset, plain: list[Activations], kind: Kind
) -> None:
    """Those that the bound is the sum of, whatever the linear layer reads."""
    recipe = RankingModifier(input=kind, canonical_correlations=True)
    compress(load(llama), [recipe], rows)
    for layer in recipe.ranking.layers:
        seen = plain[layer.index]
        rho = oracle.canonical_correlations(seen.residual, seen.residual + seen.output)
        expected = np.quantile(rho, np.linspace(0, 1, 21))
        assert layer.canonical_correlations == pytest.approx(expected, abs=1e-9)
    _, report = run(llama, NBLModifier(num_layers=1, input=kind), rows)
    assert [layer.canonical_correlations for layer in report.layers] == [None] * 4
