# SPDX-License-Identifier: Apache-2.0
"""Sums of products, of which the symmetric ones are kept as one triangle."""

import numpy as np
import pytest
import torch

from nbl_modifier.numerics import CovarianceAccumulator, covariance, gram
from nbl_modifier.numerics.gram import PackedSymmetric, add_cross_
from tests.numerics import oracle
from tests.numerics.cases import gaussian_pair, rounding
from tests.numerics.test_covariance import assert_matches_oracle


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take products as on a GPU: in bfloat16, added up in float32 piece by piece."""
    monkeypatch.setattr(covariance, "_TENSOR_CORES", {"cpu"})
    monkeypatch.setattr(gram, "_CHUNK", 64)
    monkeypatch.setattr(gram, "_CUDA_PANEL", 10)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("track_cov_yy", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_round_each_value_once(
    dtype: torch.dtype, track_cov_yy: bool
) -> None:
    # Means of up to 30 standard deviations, so that centring comes before rounding.
    X, Y = gaussian_pair(600, 24, 12)
    x = torch.from_numpy(X + np.linspace(-30.0, 30.0, 24)).to(dtype)
    y = torch.from_numpy(Y).to(dtype)
    accumulator = CovarianceAccumulator(24, 12, track_cov_yy=track_cov_yy)
    for rows_x, rows_y in zip(x.split(250), y.split(250), strict=True):
        accumulator.update(rows_x, rows_y)
    stats = accumulator.finalize()
    expected = oracle.moments(x.double().numpy(), y.double().numpy())
    std_x = np.sqrt(np.diag(expected.cov_xx))
    std_y = np.sqrt(np.diag(expected.cov_yy))
    # Each factor is off by at most 2^-9 of itself; then Cauchy and Schwarz.
    bound = 2.0**-8 + 2.0**-18 + 64 * 2.0**-24
    assert stats.cov_yy is None or track_cov_yy
    for actual, wanted, scale in (
        (stats.cov_xx, expected.cov_xx, np.outer(std_x, std_x)),
        (stats.cov_yx, expected.cov_yx, np.outer(std_y, std_x)),
        (stats.var_y, np.diag(expected.cov_yy), std_y**2),
    ):
        error = np.max(np.abs(actual.numpy() - wanted) / scale)
        assert 2.0**-24 < error < bound
    assert np.allclose(stats.mean_x.numpy(), expected.mean_x, rtol=1e-14, atol=0.0)


@pytest.mark.usefixtures("tensor_cores")
def test_tensor_cores_on_exact_numbers() -> None:
    # Small integers of mean 0, so nothing rounds, wherever the pieces end.
    half = torch.randint(-8, 9, (100, 33), generator=torch.Generator().manual_seed(0))
    x = torch.cat([half, -half]).bfloat16()
    stats = CovarianceAccumulator(33, 33).update(x, x).update(x, x).finalize()
    expected = 2.0 * (x.double().mT @ x.double()) / 399
    for actual in (stats.cov_xx, stats.cov_yx, stats.cov_yy):
        assert actual is not None
        assert torch.allclose(actual, expected, rtol=1e-15, atol=0.0)


@pytest.mark.usefixtures("tensor_cores")
def test_float32_keeps_off_tensor_cores() -> None:
    X, Y = gaussian_pair(128, 8, 8)
    X, Y = X.astype(np.float32).astype(float), Y.astype(np.float32).astype(float)
    x, y = torch.from_numpy(X).float(), torch.from_numpy(Y).float()
    stats = CovarianceAccumulator(8, 8).update(x, y).finalize()
    assert_matches_oracle(stats, X, Y)


@pytest.mark.parametrize("width", [1, 2, 3, 255, 512, 513, 514, 1300])
def test_packed_gram(width: int) -> None:
    """Every entry of the two triangles and of what is between them, and no other."""
    rows = torch.from_numpy(gaussian_pair(64, width, 1)[0])
    packed = PackedSymmetric.zeros(width, torch.device("cpu"))
    assert packed.values.numel() == width * (width + 1) // 2
    for part in rows.split(40):
        packed.add_gram_(part)
    total = packed.dense(0.5)
    expected = 0.5 * (rows.numpy().T @ rows.numpy())
    assert torch.equal(total, total.mT)
    scale = np.outer(*[np.linalg.norm(rows.numpy(), axis=0)] * 2)
    assert np.max(np.abs(total.numpy() - expected) / scale) < rounding(64, 1)
    again = PackedSymmetric.pack(packed.dense())
    assert torch.equal(again.values, packed.values)


def test_products_of_two_sides_add_up() -> None:
    left, right = (torch.from_numpy(each) for each in gaussian_pair(90, 7, 5))
    total = torch.zeros(7, 5, dtype=torch.float64)
    for rows_left, rows_right in zip(left.split(40), right.split(40), strict=True):
        assert add_cross_(total, rows_left, rows_right) is total
    np.testing.assert_allclose(
        total.numpy(), left.numpy().T @ right.numpy(), atol=1e-12
    )
