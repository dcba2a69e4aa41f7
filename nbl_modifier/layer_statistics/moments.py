"""
From activations to statistics: which rows are data, and the moments of one layer.

torch only; who registers the hooks is the modifier's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nbl_modifier.numerics import CovarianceAccumulator, CovarianceStats, NonFiniteError

__all__ = ["LayerMoments", "LayerStatistics", "check_causal", "valid_tokens"]


def check_causal(
    name: str,
    module: nn.Module,
    implementation: str | None,
    attention_mask: Tensor | None,
) -> None:
    """
    Raise if causal attention is about to be measured without its causal mask.

    In calibration the model makes the masks of eager attention, so without one every
    token sees the future, or padding counts as data: what is to be fitted is not what
    the model computes.

    :param name: module name, for the message
    :param module: the attention module
    :param implementation: of attention, for which the model makes its masks
    :param attention_mask: ``[batch, 1, tokens, tokens]`` or None, as called
    :raises RuntimeError: if eager causal attention has no mask
    """
    causal = getattr(module, "is_causal", False)
    if attention_mask is None and causal and implementation == "eager":
        raise RuntimeError(
            f"{name}: attention ran without a causal mask, so its outputs are not "
            "those of the model. The calibration pipeline lost the mask while tracing; "
            "use oneshot(pipeline='basic')."
        )


def valid_tokens(
    hidden_states: Tensor, attention_mask: Tensor | None, loss_mask: Tensor | None
) -> Tensor | None:
    """
    Return which positions are data: not padding and not masked from the loss.

    A padding position may not attend to itself: the eager mask's diagonal tells.

    :param hidden_states: ``[batch, tokens, hidden_size]``
    :param attention_mask: ``[batch, 1, tokens, tokens]``, bool (True: may attend) or
        float (0: may attend), or None
    :param loss_mask: ``[batch, tokens]``, nonzero where a token counts, or None
    :return: bool ``[batch, tokens]``, or None if every position is data
    """
    valid: Tensor | None = None
    if attention_mask is not None and attention_mask.shape[-2] > 1:
        diagonal = attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0]
        valid = diagonal if diagonal.dtype == torch.bool else diagonal == 0
        valid = valid.expand(hidden_states.shape[:2])
    if loss_mask is not None:
        counts = loss_mask.to(hidden_states.device) != 0
        valid = counts if valid is None else valid & counts
    return valid


@dataclass(frozen=True)
class LayerMoments:
    """
    What is known of one attention layer when all its tokens have been seen.

    :param residual: moments of (R, A), of the residual stream and what is added to it
    :param normalized: moments of (norm(R), A), if the estimator reads that
    :param cosine_distance: one minus the mean cosine similarity of R and R + A,
        dimensionless, in [0, 2]; what attention DROP ranks layers by, He et al.,
        arXiv:2406.15786
    """

    residual: CovarianceStats
    normalized: CovarianceStats | None
    cosine_distance: float

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return self.residual.num_tokens

    def merge(self, other: LayerMoments) -> LayerMoments:
        """Return the moments of both ones' tokens; ``other`` is of the same layer."""
        normalized = None
        if self.normalized is not None and other.normalized is not None:
            normalized = self.normalized.merge(other.normalized)
        total = self.num_tokens + other.num_tokens
        cosines = sum(each.cosine_distance * each.num_tokens for each in (self, other))
        return LayerMoments(
            self.residual.merge(other.residual), normalized, cosines / total
        )

    def to(self, device: torch.device) -> LayerMoments:
        """Return the moments on ``device``, which must support float64."""
        return LayerMoments(
            self.residual.to(device),
            None if self.normalized is None else self.normalized.to(device),
            self.cosine_distance,
        )


class LayerStatistics:
    """
    Moments of one attention layer, streamed batch by batch.

    The estimator maps X to the attention output A, the CCA bound relates the residual
    stream R to R + A; NBL, arXiv:2505.21077, Algorithms 1 and 2. With X = R
    (``input: residual``) ``2 d^2`` float64 values hold all of it, of a full matrix and
    two symmetric ones; with X = norm(R) (``normalized``) ``3.5 d^2``.

    :param name: module name, for errors
    :param hidden_size: d
    :param normalized: whether X is the output of the input norm
    :param device: where the sums live
    """

    def __init__(
        self, name: str, hidden_size: int, normalized: bool, device: torch.device
    ) -> None:
        self.name = name
        self.hidden_size = hidden_size
        #: What this was made with, and either kind of statistics can be made with.
        self.form = (name, hidden_size, normalized, device)
        self.seconds = 0.0
        self._cosine_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._residual = CovarianceAccumulator(hidden_size, hidden_size, device=device)
        self._normalized = (
            CovarianceAccumulator(
                hidden_size, hidden_size, device=device, track_cov_yy=False
            )
            if normalized
            else None
        )

    @property
    def num_tokens(self) -> int:
        """Rows accumulated so far."""
        return self._residual.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the sums' matrices."""
        extra = 0 if self._normalized is None else self._normalized.nbytes
        return self._residual.nbytes + extra

    def update(
        self, residual: Tensor, normalized: Tensor, output: Tensor, valid: Tensor | None
    ) -> None:
        """
        Add one batch.

        :param residual: R, ``[batch, tokens, d]``
        :param normalized: norm(R), ``[batch, tokens, d]``
        :param output: A, ``[batch, tokens, d]``
        :param valid: bool ``[batch, tokens]``, the rows that are data; None: all
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        residual, normalized, output = _rows(valid, residual, normalized, output)
        try:
            self._residual.update(residual, output)
            if self._normalized is not None:
                self._normalized.update(normalized, output)
            before, after = residual.float(), residual.float() + output.float()
            cosine = torch.cosine_similarity(before, after, dim=-1)
            self._cosine_sum += cosine.sum(dtype=torch.float64)
        except NonFiniteError as err:
            raise NonFiniteError(f"{self.name}: {err}") from err

    def pool_(
        self, add_up: Callable[[Tensor], object], collect: Callable[[Tensor], object]
    ) -> None:
        """
        Make this the statistics of all processes' tokens, in place.

        :param add_up: see :meth:`CovarianceAccumulator.pool_`
        :param collect: see :meth:`CovarianceAccumulator.pool_`; where it does not
            collect, this is left undefined
        """
        add_up(self._cosine_sum)
        self._residual.pool_(add_up, collect)
        if self._normalized is not None:
            self._normalized.pool_(add_up, collect)

    def finalize(self) -> LayerMoments:
        """
        Return the moments of all tokens so far.

        :raises ValueError: if fewer than 2 tokens were seen
        """
        normalized = None if self._normalized is None else self._normalized.finalize()
        residual = self._residual.finalize()
        distance = 1.0 - float(self._cosine_sum) / self.num_tokens
        return LayerMoments(residual, normalized, distance)


class HeldoutStatistics:
    """
    Moments of one attention layer's held-out tokens, streamed batch by batch.

    Only what the error of a map from X to A depends on: ``1.5 d^2`` float64 values.
    Methods as those of :class:`LayerStatistics`.

    :param name: module name, for errors
    :param hidden_size: d
    :param normalized: whether X is the output of the input norm
    :param device: where the sums live
    """

    def __init__(
        self, name: str, hidden_size: int, normalized: bool, device: torch.device
    ) -> None:
        self.name = name
        #: As of :class:`LayerStatistics`.
        self.form = (name, hidden_size, normalized, device)
        self.seconds = 0.0
        self._is_normalized = normalized
        self._moments = CovarianceAccumulator(
            hidden_size, hidden_size, device=device, track_cov_yy=False
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the sums' matrices."""
        return self._moments.nbytes

    def update(
        self, residual: Tensor, normalized: Tensor, output: Tensor, valid: Tensor | None
    ) -> None:
        """
        Add one batch.

        :param residual: R, ``[batch, tokens, d]``
        :param normalized: norm(R), ``[batch, tokens, d]``
        :param output: A, ``[batch, tokens, d]``
        :param valid: bool ``[batch, tokens]``, the rows that are data; None: all
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        x = normalized if self._is_normalized else residual
        try:
            self._moments.update(*_rows(valid, x, output))
        except NonFiniteError as err:
            raise NonFiniteError(f"{self.name}: {err}") from err

    def pool_(
        self, add_up: Callable[[Tensor], object], collect: Callable[[Tensor], object]
    ) -> None:
        """
        Make this the statistics of all processes' tokens, in place.

        :param add_up: see :meth:`CovarianceAccumulator.pool_`
        :param collect: see :meth:`CovarianceAccumulator.pool_`; where it does not
            collect, this is left undefined
        """
        self._moments.pool_(add_up, collect)

    def finalize(self) -> CovarianceStats:
        """
        Return the moments of (X, A) of all tokens so far, without those of (A, A).

        :raises ValueError: if fewer than 2 tokens were seen
        """
        return self._moments.finalize()


def _rows(valid: Tensor | None, *batches: Tensor) -> tuple[Tensor, ...]:
    """Return ``[batch, tokens, d]`` as ``[num_tokens, d]``, only the valid tokens."""
    return tuple(
        values.flatten(0, 1) if valid is None else values[valid] for values in batches
    )
