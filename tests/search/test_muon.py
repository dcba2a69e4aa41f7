# SPDX-License-Identifier: Apache-2.0
"""The optimizer: what its steps are, whatever the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbl_modifier.search.muon import Muon, Trained, orthogonalized


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 1e-3), (torch.bfloat16, 0.08)]
)
@pytest.mark.parametrize("shape", [(40, 40), (16, 64), (64, 16)])
def test_orthogonalized(shape: tuple[int, int], dtype: torch.dtype, off: float) -> None:
    """The same singular vectors, and singular values near one."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * 1e-6
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalized(matrix, dtype) @ vt.T
    off_diagonal = found - found.diagonal().diag()
    assert off_diagonal.abs().max() < off
    large = s > 2e-3 * s.sum()  # more iterations would lift the others, too
    assert (found.diagonal()[large] > 0.65).all()
    assert (found.diagonal() < 1.25).all()


def test_zero_stays_zero() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_gradients_do_not_set_the_size_of_a_step(scale: float) -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    vector = nn.Parameter(torch.zeros(8))
    muon = Muon([Trained(parameter, 0.1), Trained(vector, 0.2)], steps=1)
    generator = torch.Generator().manual_seed(0)
    parameter.grad = torch.randn(8, 8, generator=generator) * scale
    vector.grad = torch.randn(8, generator=generator) * scale
    against = parameter.grad.clone()
    muon.step()
    assert all(each.grad is None for each in (parameter, vector))
    norm = float(torch.linalg.matrix_norm(parameter.detach(), 2))
    assert 0.068 < norm < 0.122
    assert (parameter.detach() * against).sum() < 0
    torch.testing.assert_close(
        vector.detach().abs(), torch.full((8,), 0.2), rtol=0.01, atol=0
    )


def test_it_finds_a_minimum() -> None:
    """Where the rate falls to zero, so does the distance."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(12, 12, generator=generator)
    parameter = nn.Parameter(torch.zeros(12, 12))
    steps = 200
    muon = Muon([Trained(parameter, 0.2)], steps)
    for _ in range(steps):
        (parameter - wanted).square().sum().backward()
        muon.step()
    assert (parameter - wanted).norm() < 0.05 * wanted.norm()
