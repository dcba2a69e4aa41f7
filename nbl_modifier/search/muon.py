# SPDX-License-Identifier: Apache-2.0
"""
Muon: steps whose size no gradient sets.

Of several processes each has the gradients of its own windows. They are added up, each
matrix in one process, which orthogonalizes it and gives the others the direction: all
take the same step, and none repeats another's work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nbl_modifier.layer_statistics.processes import Ranks

__all__ = ["Muon", "Trained", "orthogonalized"]

# The learning rate rises over so many steps, and falls along a cosine to the end.
_WARMUP = 8
_MOMENTUM = 0.95
# A polynomial whose iteration brings all singular values of a matrix near one, from
# Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


@dataclass(frozen=True)
class Trained:
    """
    A parameter, and how far a step takes it.

    :param parameter: a matrix ``[d_out, d_in]``, or a vector ``[d]``
    :param step: of a matrix, the spectral norm of a full step; of a vector, how much
        each value changes by
    """

    parameter: nn.Parameter
    step: float


class Muon:
    """
    Orthogonalized momentum for matrices, Adam for vectors.

    ``torch.optim.Muon`` has one step size for all matrices.

    :param trained: what is trained, in float32
    :param steps: after how many the learning rate has fallen to zero
    :param dtype: of the products that orthogonalize; bfloat16 is accurate enough
    :param ranks: the processes that train the same parameters
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        steps: int,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._matrices = [each for each in trained if each.parameter.ndim == 2]
        self._momenta = {
            position: torch.zeros_like(each.parameter.detach())
            for position, each in enumerate(self._matrices)
            if self._ranks.owner(position) == self._ranks.rank
        }
        vectors = [each for each in trained if each.parameter.ndim == 1]
        self._vectors = [
            (
                torch.optim.Adam(
                    [each.parameter],
                    lr=each.step,
                    betas=(0.9, 0.99),
                    eps=1e-15,  # 1e-8 is what gradients of a large model may be
                ),
                each.step,
            )
            for each in vectors
        ]
        self._steps, self._done = steps, 0
        self._dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Take a step along the gradients of all processes, and forget them."""
        scale = self._scale(self._done)
        if not self._ranks.alone:
            self._add_up()
        for position, momentum in self._momenta.items():
            parameter = self._matrices[position].parameter
            gradient = parameter.grad
            if gradient is not None:
                momentum.mul_(_MOMENTUM).add_(gradient)
                ahead = gradient + _MOMENTUM * momentum
                parameter.grad = orthogonalized(ahead, self._dtype).contiguous()
        for position, each in enumerate(self._matrices):
            direction = each.parameter.grad
            if direction is not None:
                self._ranks.share(direction, self._ranks.owner(position))
                each.parameter.sub_(direction, alpha=each.step * scale)
                each.parameter.grad = None
        for adam, size in self._vectors:
            adam.param_groups[0]["lr"] = size * scale
            adam.step()
            adam.zero_grad()
        self._done += 1

    def skip(self) -> None:
        """Let a step pass in which no process has gradients."""
        self._done += 1

    def _add_up(self) -> None:
        """Add up the gradients of all processes, those of matrices in their owners."""
        for position, each in enumerate(self._matrices):
            gradient = _gradient(each.parameter).contiguous()
            self._ranks.add_up(gradient, self._ranks.owner(position))
            each.parameter.grad = gradient
        parameters = [
            parameter
            for adam, _ in self._vectors
            for parameter in adam.param_groups[0]["params"]
        ]
        if not parameters:
            return
        device = parameters[0].device
        gradients = [_gradient(each).to(device) for each in parameters]
        together = torch.cat(gradients)
        self._ranks.add_up(together)
        parts = together.split([len(each) for each in gradients])
        for each, part in zip(parameters, parts, strict=True):
            each.grad = part.to(each.device, each.dtype)

    def _scale(self, step: int) -> float:
        warm = min(1.0, (step + 1) / min(_WARMUP, self._steps))
        return warm * (1 + math.cos(math.pi * step / self._steps)) / 2


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient, zeros if there is none here."""
    gradient = parameter.grad
    return torch.zeros_like(parameter.detach()) if gradient is None else gradient


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """
    Return the matrix with all its singular values brought near one, by products only.

    :param matrix: ``[rows, columns]``, floating point; zeros stay zeros
    :param dtype: of the products
    :return: ``[rows, columns]``, dtype of ``matrix``, singular values between about
        0.7 and 1.2, but for those that were below a thousandth of the largest
    """
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.T
    x = (x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)).to(dtype)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = first * x + (third * square + fifth * square @ square) @ x
    return (x if rows <= columns else x.T).to(matrix.dtype)
