# SPDX-License-Identifier: Apache-2.0
"""Counts work instead of time: what a busy machine cannot change."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _addmm_flops(
    total: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * a[0] * a[1] * b[1]


def _cholesky_flops(a: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return a[-1] ** 3 // 3


def _triangular_flops(
    a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return a[-1] ** 2 * b[-1]


def count_flops() -> FlopCounterMode:
    """
    Return a context that counts floating-point operations, a multiply-add as two.

    torch's own counter knows matrix products; those in place, factorizations and
    triangular solves are added.
    """
    mapping: dict[Any, Any] = {
        aten.addmm_: _addmm_flops,
        aten.linalg_cholesky_ex: _cholesky_flops,
        aten.linalg_solve_triangular: _triangular_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


class CountCalls(TorchDispatchMode):
    """Counts operators by name, as ``aten.mm``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """
    Follows the bytes of the float64 tensors made within it that are alive.

    Views count with the memory they keep alive, once. ``peak`` is the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self._views: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in known:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.dtype != torch.float64:
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if self._views[key] == 0:
            self.alive += nbytes
            self.peak = max(self.peak, self.alive)
        self._views[key] += 1
        weakref.finalize(tensor, self._remove, key, nbytes)

    def _remove(self, key: int, nbytes: int) -> None:
        self._views[key] -= 1
        if self._views[key] == 0:
            self.alive -= nbytes


class WindowCounter:
    """Counts how often the MLPs of a model run over a window, all runs included."""

    def __init__(self, model: nn.Module) -> None:
        self.windows = 0
        for name, module in model.named_modules():
            if name.endswith("mlp"):
                module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.windows += len(args[0])
