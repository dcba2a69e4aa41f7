# SPDX-License-Identifier: Apache-2.0
"""Moments in, measurement and replacement out, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.layer_statistics.moments import LayerMoments, LayerStatistics
from tests.calibration.observed import observed
from tests.numerics import oracle

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, INDEX = 32, 1


def data(num_tokens: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return what a layer reads and what it adds, which is nearly linear in that."""
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((num_tokens, WIDTH)) + 2.0
    mixing = np.random.default_rng(9).standard_normal((WIDTH, WIDTH)) / 6
    Y = X @ mixing + 0.3 * generator.standard_normal(X.shape)
    return X.astype(np.float32).astype(float), Y.astype(np.float32).astype(float)


def moments(X: np.ndarray, Y: np.ndarray, normalized: bool = False) -> LayerMoments:
    statistics = LayerStatistics("layer", WIDTH, normalized, torch.device("cpu"))
    residual, output = (torch.from_numpy(each).float()[None] for each in (X, Y))
    statistics.update(residual, residual * 2 - 1, output, None)
    return statistics.finalize()


def solver(folder: Path, spec: LinearizedLayer | None = None, **options: Any) -> Any:
    return LayerSolver(layers=observed(folder, spec=spec).layers, **options)


@pytest.mark.parametrize("reads", ["residual", "normalized"])
def test_map_and_errors_are_those_of_a_least_squares_fit(
    llama: Path, reads: Literal["residual", "normalized"]
) -> None:
    X, Y = data()
    X_new, Y_new = data(seed=1)
    spec = LinearizedLayer(reads, "attention", "linear", None)
    normalized = reads == "normalized"
    one = solver(llama, spec)
    fit, heldout = one.divided(
        moments(X, Y, normalized), moments(X_new, Y_new, normalized)
    )
    solved = one.solve(INDEX, fit, heldout)
    if normalized:
        X, X_new = 2 * X - 1, 2 * X_new - 1
    W, b = oracle.lmmse(X, Y)
    # rounded to float32
    assert torch.allclose(
        solved.replacement.weight.double(), torch.from_numpy(W), rtol=0, atol=1e-6
    )
    found = solved.measurement
    # float64 of well-conditioned moments
    assert found.nmse == pytest.approx(oracle.nmse(X, Y, W, b), rel=1e-9)
    assert found.heldout_nmse == pytest.approx(
        oracle.nmse(X_new, Y_new, W, b), rel=1e-9
    )
    assert found.num_tokens == 200
    assert solved.rank == WIDTH


def test_the_same_moments_give_the_same_bits(llama: Path) -> None:
    """Nothing is kept between two layers."""
    one, given = solver(llama, correlations=True), moments(*data())
    first, _, again = (
        one.solve(INDEX, each) for each in (given, moments(*data(seed=3)), given)
    )
    assert torch.equal(first.replacement.weight, again.replacement.weight)
    assert replace(first.measurement, seconds=0.0) == replace(
        again.measurement, seconds=0.0
    )
    assert first.measurement.canonical_correlations is not None


def test_held_out_tokens_are_fitted_on_where_nobody_asks_for_errors(
    llama: Path,
) -> None:
    one = solver(llama, measure_held_out=False)
    halves = [moments(*data(seed=seed)) for seed in (0, 1)]
    fit, heldout = one.divided(*halves)
    assert heldout is None
    assert fit.num_tokens == 400
    assert one.solve(INDEX, fit).measurement.heldout_nmse is None


def test_a_layer_that_is_dropped_adds_nothing(llama: Path) -> None:
    spec = LinearizedLayer("residual", "attention", "drop", None)
    X, Y = data()
    solved = solver(llama, spec).solve(INDEX, moments(X, Y))
    assert solved.replacement.weight is None
    zero = np.zeros((WIDTH, WIDTH)), np.zeros(WIDTH)
    expected = oracle.nmse(X, Y, *zero)
    assert solved.measurement.nmse == pytest.approx(expected, rel=1e-9)
    # not fitted: but for the mean, new tokens do no worse
    assert solved.measurement.expected_nmse == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (data(WIDTH - 2), r"layers\.1\.self_attn: .*tokens"),
        ((np.full((99, WIDTH), 3.0), data(99)[1]), r"layers\.1\..*the same at all 99"),
    ],
    ids=["few", "constant"],
)
def test_what_cannot_be_fitted_names_the_layer(
    llama: Path, rows: tuple[np.ndarray, np.ndarray], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solver(llama).solve(INDEX, moments(*rows))
