"""
One calibration pass over the attention layers: hooks in, solved linear maps out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.core import State
from loguru import logger
from torch import Tensor, nn

from . import numerics
from .architectures import Architecture
from .capture import LayerStatistics, check_causal, valid_tokens
from .hf.configuration_nbl import LinearizedLayer
from .preflight import check_num_tokens
from .surgery import Replacement, weight_dtype

__all__ = ["Calibration", "Measurement"]


@dataclass(frozen=True)
class Measurement:
    """
    How linear one attention layer is, in sample.

    :param num_tokens: rows that the statistics were taken over
    :param nmse: error of the linear map over the variance of the attention output
    :param residual_nmse: the same error over the variance of the residual stream after
        attention
    :param cca_bound: ``sum_i (1 - rho_i^2)``, arXiv:2505.21077, Algorithm 2
    :param dampening_frac: dampening used, a fraction of the mean diagonal of C_xx
    :param seconds: spent on statistics and solve
    """

    num_tokens: int
    nmse: float
    residual_nmse: float
    cca_bound: float
    dampening_frac: float
    seconds: float


class Calibration:
    """
    Statistics of the layers in flight, and the results of those that are finished.

    Of the replacements only the ``keep`` best are held, on the CPU, in the dtype of the
    model: all of an 80-layer model's would take more memory than its statistics.

    What is fitted is what attention adds to the residual stream: its output, through
    the norm that some families have behind it. The bound is on the stream after that
    addition, and what is linear in its input is the addition, not what a norm makes of
    it; a linear map of attention's output alone would also lose the shrinkage that
    makes an uncertain estimate a good one, which the norm undoes.

    :param layers: decoder layer by index
    :param names: name of its attention module, likewise
    :param architecture: names of the modules inside the layers
    :param spec: what is replaced by what, in every layer
    :param dampening_frac: fraction of the mean diagonal of C_xx
    :param criterion: the field of :class:`Measurement` that decides which replacements
        to keep
    :param keep: how many
    """

    def __init__(
        self,
        layers: dict[int, nn.Module],
        names: dict[int, str],
        architecture: Architecture,
        *,
        spec: LinearizedLayer,
        dampening_frac: float,
        criterion: str,
        keep: int,
    ) -> None:
        self.measured: dict[int, Measurement] = {}
        self.replacements: dict[int, Replacement] = {}
        self._layers = layers
        self._names = names
        self._architecture = architecture
        self._spec = spec
        self._normalized = spec.input == "normalized"
        self._dampening_frac = dampening_frac
        self._criterion = criterion
        self._keep = keep
        self._started_at = time.perf_counter()
        self._residuals: dict[int, tuple[int, Tensor]] = {}
        self._statistics: dict[int, LayerStatistics] = {}

    @property
    def seconds(self) -> float:
        """Wall time since calibration started."""
        return time.perf_counter() - self._started_at

    def scores(self) -> dict[int, float]:
        """Return the criterion's value by layer index, lower is more linear."""
        return {i: getattr(m, self._criterion) for i, m in self.measured.items()}

    def see_norm_input(
        self, state: State, index: int, _module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        """Forward-pre hook on the input norm: keep the residual stream, R."""
        self._residuals[index] = (state.current_batch_idx, args[0])

    def see_attention(
        self,
        state: State,
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, ...],
    ) -> None:
        """
        Forward hook on attention: add the batch to the layer's statistics.

        :raises RuntimeError: if the pipeline lost the causal mask, or ran norm and
            attention in different passes
        :raises NonFiniteError: naming the layer, if an activation is NaN or inf
        """
        started_at = time.perf_counter()
        name = self._names[index]
        normalized = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch, residual = state.current_batch_idx, normalized
        if self._architecture.input_norm is not None:
            batch, residual = self._residuals.pop(index, (-1, None))
        if residual is None or batch != state.current_batch_idx:
            raise RuntimeError(
                f"{name}: its input norm ran on another batch than attention did. Set "
                "sequential_targets to the decoder layer class, or leave it unset."
            )
        mask = kwargs.get("attention_mask")
        check_causal(name, module, mask)
        loss_mask = state.loss_masks[batch] if state.loss_masks else None
        valid = valid_tokens(normalized, mask, loss_mask)
        if index not in self._statistics:
            self._statistics[index] = LayerStatistics(
                name, normalized.shape[-1], self._normalized, normalized.device
            )
        statistics = self._statistics[index]
        added = self._added_to_stream(index, output[0])
        statistics.update(residual, normalized, added, valid)
        statistics.seconds += time.perf_counter() - started_at

    def _added_to_stream(self, index: int, output: Tensor) -> Tensor:
        """Return what attention's output of layer ``index`` adds to the stream."""
        post_norm, scale = self._architecture.post_norm, self._output_scale(index)
        if post_norm is not None:
            output = self._layers[index].get_submodule(post_norm)(output)
        return output if scale == 1.0 else output * scale

    def _attention(self, index: int) -> nn.Module:
        return self._layers[index].get_submodule(self._architecture.attention)

    def _output_scale(self, index: int) -> float:
        scale = self._architecture.output_scale
        return 1.0 if scale is None else getattr(self._layers[index], scale)

    def solve_finished(self, modules: Iterable[nn.Module]) -> None:
        """
        Solve the layers whose attention is among ``modules``, free their statistics.

        :param modules: what the pipeline has finished calibrating
        :raises ValueError: naming the layer, if it saw too few tokens
        :raises torch.linalg.LinAlgError: naming the layer, if it cannot be solved
        """
        finished = set(map(id, modules))
        for index in sorted(self._statistics):
            if id(self._attention(index)) in finished:
                self._solve(index, self._statistics.pop(index))

    def _solve(self, index: int, statistics: LayerStatistics) -> None:
        started_at = time.perf_counter()
        name = self._names[index]
        check_num_tokens(name, statistics.num_tokens, statistics.hidden_size)
        try:
            residual, normalized = statistics.finalize()
            solution = numerics.solve_attention(residual, self._dampening_frac)
            linear_map, fit = solution.linear_map, residual
            if normalized is not None:
                fit = normalized
                linear_map = numerics.solve_lmmse(fit, self._dampening_frac)
            nmse = numerics.nmse(fit, linear_map)
            # The layer goes on to scale what comes from the map, as it did attention.
            scale = self._output_scale(index)
            dtype = weight_dtype(self._attention(index))
            weight, bias = dataclasses.replace(
                linear_map,
                weight=linear_map.weight / scale,
                mean_y=linear_map.mean_y / scale,
            ).cast(dtype)
        except (ValueError, torch.linalg.LinAlgError) as err:
            raise type(err)(f"{name}: {err}") from err
        # The same error in another unit: only the variance it is divided by differs.
        variance_ratio = float(fit.var_y.sum()) / solution.residual_variance
        measurement = Measurement(
            num_tokens=fit.num_tokens,
            nmse=nmse,
            residual_nmse=nmse * variance_ratio,
            cca_bound=solution.bound,
            dampening_frac=linear_map.dampening_frac,
            seconds=statistics.seconds + time.perf_counter() - started_at,
        )
        self.measured[index] = measurement
        self.replacements[index] = Replacement(self._spec, weight.cpu(), bias.cpu())
        self._drop_worst()
        logger.info(
            "{}: {} tokens, NMSE {:.4f}, CCA bound {:.4f}, dampening {:.1e}, {:.2f} s",
            name,
            measurement.num_tokens,
            measurement.nmse,
            measurement.cca_bound,
            measurement.dampening_frac,
            measurement.seconds,
        )

    def _drop_worst(self) -> None:
        if len(self.replacements) > self._keep:
            scores = self.scores()
            worst = max(self.replacements, key=lambda index: (scores[index], index))
            del self.replacements[worst]
