"""
Matrix products of half-precision models on CPUs that have no instructions for them.

Without AVX-512, torch multiplies bfloat16 matrices 4 to 80 times slower than float32
ones, depending on their layout, and float16 matrices on most CPUs. Here such products
are computed in float32 and rounded to the dtype of the model, which is what
instructions for bfloat16 do as well: weights, activations, hooks and whatever is saved
keep their dtype, and what is in memory in float32 is one weight at a time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import (
    TorchFunctionMode,
    _len_torch_function_stack,
    _pop_mode,
    _push_mode,
)

__all__ = ["VARIABLE", "FastProducts"]

#: The environment variable that decides instead of the measurement.
VARIABLE = "NBL_CPU_PRODUCTS"
_AUTO, _FLOAT32, _NATIVE = _CHOICES = ("auto", "float32", "native")

_HALF = (torch.bfloat16, torch.float16)
# With fewer rows, as in generation, converting a weight takes longer than its product.
_FEWEST_ROWS = 8
# Below this, a measurement is not worth acting on.
_LEAST_GAIN = 1.5
# [rows, d_in] times [d_in, d_out]: a few milliseconds, half a second at the worst.
_MEASURED = (128, 512, 512)

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.linear,
        functional.scaled_dot_product_attention,
        functional.conv1d,
        functional.conv2d,
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.einsum,
        torch.matmul,
        torch.mm,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.addmm,
        Tensor.baddbmm,
        Tensor.bmm,
        Tensor.matmul,
        Tensor.mm,
    }
)


class FastProducts(TorchFunctionMode):
    """
    Products of half-precision tensors on the CPU, in float32 where that is faster.

    A context, or :meth:`switch_on` and :meth:`switch_off` where what lies between is
    someone else's; they may be nested. What is faster is measured once per process and
    dtype, when the first such product is met; ``NBL_CPU_PRODUCTS=float32`` or
    ``native`` decides instead. Other devices and dtypes are left alone, and so is what
    torch compiles. Backward computes as forward did, but layers that it runs again need
    a context of their own: torch leaves this one out there.

    :raises ValueError: if the environment variable has another value
    """

    def __init__(self) -> None:
        super().__init__()
        self._choice = _asked_for()

    def __enter__(self) -> Self:
        """Compute so in this thread from now on."""
        self.switch_on()
        return self

    def __exit__(self, *_: object) -> None:
        """Undo that."""
        self.switch_off()

    def switch_on(self) -> None:
        """
        Compute so in this thread until :meth:`switch_off`.

        Below all contexts that are entered already: whoever leaves one of them before
        :meth:`switch_off` must meet his own on top. The default device is the lowest
        and has to stay so (torch 2.13, utils/_device.py).
        """
        stack = _take_modes()
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        at = 1 if stack and stack[0] is default else 0
        _put_modes([*stack[:at], self, *stack[at:]])

    def switch_off(self) -> None:
        """Undo :meth:`switch_on`, if it was called."""
        stack = _take_modes()
        if self in stack:
            stack.remove(self)
        _put_modes(stack)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, torch calls this instead of it."""
        kwargs = kwargs or {}
        if func in _PRODUCTS and not torch.compiler.is_compiling():
            dtype = _half_dtype(func, [*args, *kwargs.values()])
            if dtype is not None and self._in_float32(dtype):
                args = tuple(map(_widened, args))
                kwargs = {name: _widened(value) for name, value in kwargs.items()}
                return func(*args, **kwargs).to(dtype)
        return func(*args, **kwargs)

    def _in_float32(self, dtype: torch.dtype) -> bool:
        if self._choice == _AUTO:
            return _faster_in_float32(dtype)
        return self._choice == _FLOAT32


def _asked_for() -> str:
    choice = os.environ.get(VARIABLE) or _AUTO
    if choice not in _CHOICES:
        raise ValueError(
            f"{VARIABLE} must be one of {', '.join(_CHOICES)}, got {choice!r}. It says "
            "how products of bfloat16 and float16 matrices are computed on a CPU."
        )
    return choice


def _take_modes() -> list[TorchFunctionMode]:
    """Empty the stack of modes and return it, the lowest first."""
    return [_pop_mode() for _ in range(_len_torch_function_stack())][::-1]


def _put_modes(modes: Iterable[TorchFunctionMode]) -> None:
    for mode in modes:
        _push_mode(mode)


def _half_dtype(
    func: Callable[..., Any], arguments: Iterable[Any]
) -> torch.dtype | None:
    """Return the dtype of a product's operands, if it may be better done in float32."""
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    operands = [each for each in tensors if each.is_floating_point()]  # no masks
    dtypes = {each.dtype for each in operands}
    matrix = next((each for each in operands if each.ndim >= 2), None)
    if matrix is None or len(dtypes) > 1 or matrix.dtype not in _HALF:
        return None
    # Subclasses stand for other things than their values.
    if any(
        each.device.type != "cpu" or type(each) not in (Tensor, nn.Parameter)
        for each in tensors
    ):
        return None
    rows = matrix.shape[-2]
    if func is functional.linear:
        rows = matrix.shape[:-1].numel()
    return matrix.dtype if rows >= _FEWEST_ROWS else None


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _HALF:
        return value.float()
    return value


@cache
def _faster_in_float32(dtype: torch.dtype) -> bool:
    """Measure it, and say so."""
    rows, d_in, d_out = _MEASURED
    x, weight = torch.ones(rows, d_in, dtype=dtype), torch.ones(d_out, d_in).to(dtype)

    def forward_and_backward() -> None:
        # Two layouts, of which the second may be the slower by far.
        functional.linear(x, weight) @ weight

    def in_float32() -> None:
        wide = functional.linear(x.float(), weight.float()).to(dtype)
        (wide.float() @ weight.float()).to(dtype)

    # A context around this one would compute the native products in float32, too.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        native, float32 = _seconds(forward_and_backward), _seconds(in_float32)
    gigaflops = 4 * rows * d_in * d_out / 1e9
    chosen = native > _LEAST_GAIN * float32
    name = str(dtype).removeprefix("torch.")
    _say(
        f"{name} matrix products on this CPU: {gigaflops / native:.3g} GFLOP/s, "
        f"{gigaflops / float32:.3g} by way of float32, so they are computed "
        f"{'in float32 and rounded' if chosen else f'in {name}'} "
        f"({VARIABLE}=float32 or native decides otherwise)"
    )
    return chosen


def _say(message: str) -> None:
    try:
        from loguru import logger
    except ImportError:  # where models are evaluated, but not compressed
        logging.getLogger(__name__).info(message)
    else:
        logger.info(message)


def _seconds(run: Callable[[], None]) -> float:
    """Return the shorter time of two runs, the first of which may set things up."""
    times = []
    for _ in range(2):
        started_at = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_at)
    return min(times)
