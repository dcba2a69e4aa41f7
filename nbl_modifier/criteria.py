# SPDX-License-Identifier: Apache-2.0
"""
What layers are ranked by: a row for each criterion, which options, search, tables,
report, command line and docs read. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CRITERIA", "TRIED", "Criterion"]

# What is known only of a model that was run with the layer replaced.
_EFFECTS = frozenset({"loss", "kl"})


@dataclass(frozen=True)
class Criterion:
    """
    A number per layer; those with the lowest are replaced first.

    :param name: in recipes, reports and on the command line
    :param heading: of its column in tables
    :param lower_means: what a low value says, for the docs
    :param reads: the figures that it is made from: fields of ``Measurement``, or
        ``loss`` and ``kl``, the increase of the mean negative log-likelihood on
        held-out windows and the divergence of the next-token distributions from the
        original model's with this layer alone replaced, in nats per token
    :param compute: makes it of them, in that order; None: it is the only one
    :param digits: how it is written where space is scarce; empty: not at all
    :param fine_digits: how it is written on a page
    """

    name: str
    heading: str
    lower_means: str
    reads: tuple[str, ...]
    digits: str
    fine_digits: str
    compute: Callable[..., float] | None = None

    @property
    def tried(self) -> bool:
        """Whether it takes a trial of each layer on held-out windows."""
        return not _EFFECTS.isdisjoint(self.reads)

    def of(self, figures: object) -> float | None:
        """
        Return its value.

        :param figures: of a layer, as attributes
        :return: None where a figure is missing
        """
        values = [getattr(figures, name, None) for name in self.reads]
        if any(value is None for value in values):
            return None
        compute: Callable[..., float] = self.compute or float
        return compute(*values)


def _times_angle(kl: float, cosine: float) -> float:
    """
    Return the divergence times the angle by which attention turns the stream.

    :param kl: in nats per token
    :param cosine: one minus the cosine of that angle
    """
    return kl * math.acos(max(-1.0, 1.0 - cosine))


_ROWS = (
    Criterion(
        "cca_bound",
        "bound",
        "the residual stream after attention is nearer to a linear map of the one "
        "before, each direction counting alike",
        ("cca_bound",),
        ".3f",
        ".3f",
    ),
    Criterion(
        "nmse",
        "NMSE",
        "less of the variance of attention's output is left unexplained",
        ("nmse",),
        ".4f",
        ".4f",
    ),
    Criterion(
        "residual_nmse",
        "residual NMSE",
        "the same error, over the variance of the residual stream after attention",
        ("residual_nmse",),
        ".5f",
        ".5f",
    ),
    Criterion(
        "cosine",
        "cosine",
        "attention turns the residual stream less: one minus the mean cosine "
        "similarity of the stream before and after (attention DROP)",
        ("cosine",),
        "",
        ".5f",
    ),
    Criterion(
        "loss",
        "loss",
        "the loss on held-out windows rises less when this layer alone is replaced",
        ("loss",),
        "+.4f",
        ".5f",
    ),
    Criterion(
        "kl",
        "KL",
        "the next-token distributions on held-out windows stay nearer to the original "
        "model's when this layer alone is replaced",
        ("kl",),
        ".4f",
        ".5f",
    ),
    Criterion(
        "kl_angle",
        "KL x angle",
        "that, times the angle by which the original layer turns the residual stream",
        ("kl", "cosine"),
        ".5f",
        ".6f",
        _times_angle,
    ),
)

#: Every criterion by its name; the first is the default.
CRITERIA = {row.name: row for row in _ROWS}
#: Names of those that are measured by trying a replacement on held-out windows.
TRIED = tuple(name for name, row in CRITERIA.items() if row.tried)
