# SPDX-License-Identifier: Apache-2.0
"""Half-precision products on a CPU: computed in float32, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.offload import offload_module
from datasets import Dataset
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode

from nbl_modifier import NBLModifier
from nbl_modifier.evaluation import perplexity
from nbl_modifier.numerics import products
from nbl_modifier.numerics.products import VARIABLE, FastProducts
from tests.followers import FOLLOWERS, TinyModels
from tests.tiny_llama import compress, linearized, load, logits_of, tensors_in

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = [torch.bfloat16, torch.float16]
aten = torch.ops.aten


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for float32, whatever is faster on this machine."""
    monkeypatch.setenv(VARIABLE, "float32")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    Forget what was measured, before and after.

    Nor may what another test's failed run has left on, until the next run, decide.
    """
    left = [m for m in products._take_modes() if not isinstance(m, FastProducts)]
    products._put_modes(left)
    monkeypatch.delenv(VARIABLE, raising=False)
    products._faster_in_float32.cache_clear()
    yield
    products._faster_in_float32.cache_clear()


class Computed(TorchDispatchMode):
    """Notes the dtypes in which products of eight rows and more are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket
        if name in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear):
            tensors = [each for each in args if isinstance(each, Tensor)]
            matrix = next(each for each in tensors if each.ndim >= 2)
            if matrix.shape[:-1].numel() >= 8 and matrix.device.type == "cpu":
                self.dtypes.add(matrix.dtype)
        elif "scaled_dot_product" in str(name):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(mask: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, v: functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if mask.dtype == torch.bool else mask.to(q.dtype)
    )


QKV = [(1, 4, 16, 32)] * 3
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[int, ...]]]] = {
    "linear": (functional.linear, [(2, 16, 64), (32, 64), (32,)]),
    "linear without bias": (functional.linear, [(16, 64), (32, 64)]),
    "@": (lambda a, b: a @ b, [(2, 16, 64), (64, 32)]),
    "matmul": (Tensor.matmul, [(16, 64), (64, 32)]),
    "bmm": (torch.bmm, [(2, 16, 64), (2, 64, 8)]),
    "addmm": (torch.addmm, [(32,), (16, 64), (64, 32)]),
    "baddbmm": (torch.baddbmm, [(2, 16, 8), (2, 16, 64), (2, 64, 8)]),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), [(16, 64), (32, 64)]),
    "conv2d": (functional.conv2d, [(1, 3, 16, 16), (8, 3, 4, 4)]),
    "attention": (attention(random(16, 16)), QKV),
    "masked attention": (attention(torch.ones(16, 16).tril().bool()), QKV),
}


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_is_the_float32_one_rounded(name: str, dtype: torch.dtype) -> None:
    product, shapes = PRODUCTS[name]
    operands = [random(*each, seed=i).to(dtype) for i, each in enumerate(shapes)]
    with FastProducts():
        result = product(*operands)
    assert result.dtype == dtype
    if name == "attention":  # whose mask is rounded, too
        product = attention(random(16, 16).to(dtype))
    wide = product(*(each.float() for each in operands))
    assert torch.equal(result, wide.to(dtype))


@pytest.mark.usefixtures("float32")
def test_gradients_are_computed_in_float32_too() -> None:
    x, weight = random(16, 64).bfloat16(), random(32, 64).bfloat16().requires_grad_()
    with FastProducts(), Computed() as computed:
        functional.linear(x, weight).square().sum().backward()
    assert computed.dtypes == {torch.float32}
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    # The output is rounded between the two products, and no more than that.
    output = functional.linear(x.float(), weight.detach().float()).bfloat16()
    expected = (2 * output).float().T @ x.float()
    assert torch.equal(weight.grad, expected.bfloat16())


@pytest.mark.usefixtures("float32")
def test_what_is_not_slow_is_left_alone() -> None:
    few = random(1, 7, 64).bfloat16(), random(32, 64).bfloat16()
    double = random(16, 64).double(), random(32, 64).double()
    with FastProducts(), Computed() as computed:
        assert functional.linear(*few).dtype == torch.bfloat16
        assert functional.linear(*double).dtype == torch.float64
    assert computed.dtypes <= {torch.float64}
    meta = [each.to("meta") for each in (random(16, 64).half(), random(32, 64).half())]
    with FastProducts():
        assert functional.linear(*meta).dtype == torch.float16
        with pytest.raises(RuntimeError, match="dtype"):  # as it is without
            functional.linear(random(16, 64), random(32, 64).bfloat16())


@pytest.mark.usefixtures("unmeasured")
def test_choice_is_measured_once_and_logged_with_both_speeds(
    logged: list[str],
) -> None:
    operands = [random(16, 64).half(), random(32, 64).half()]
    for _ in range(2):
        # nested, or the outer one would be part of what the inner one measures
        with FastProducts(), FastProducts(), Computed() as computed:
            for _ in range(2):
                functional.linear(*operands)
    (line,) = logged
    found = re.match(
        r"float16 matrix products on this CPU: (\S+) GFLOP/s, (\S+) by way of float32, "
        r"so they are computed in (float32 and rounded|float16) "
        rf"\({VARIABLE}=float32 or native decides otherwise\)",
        line,
    )
    assert found, line
    native, float32 = float(found[1]), float(found[2])
    assert native > 0
    # of the two figures three digits are printed
    if abs(float32 / native - 1.5) > 0.02:
        chosen = torch.float32 if float32 / native > 1.5 else torch.float16
        assert found[3].startswith(str(chosen).removeprefix("torch."))
        assert computed.dtypes == {chosen}


@pytest.mark.usefixtures("unmeasured")
def test_variable_decides_without_measuring(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    operands = [random(16, 64).bfloat16(), random(32, 64).bfloat16()]
    for choice, dtype in (("native", torch.bfloat16), ("float32", torch.float32)):
        monkeypatch.setenv(VARIABLE, choice)
        with FastProducts(), Computed() as computed:
            functional.linear(*operands)
        assert computed.dtypes == {dtype}
    assert logged == []


def test_wrong_variable_is_refused_before_calibration(
    monkeypatch: pytest.MonkeyPatch, llama: Path, rows: Dataset
) -> None:
    monkeypatch.setenv(VARIABLE, "bf16")
    message = f"{VARIABLE} must be one of auto, float32, native, got 'bf16'"
    with pytest.raises(ValueError, match=message):
        compress(llama, [NBLModifier(num_layers=1)], rows)


@pytest.mark.usefixtures("float32")
def test_other_contexts_may_end_before_it_does() -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    fast = FastProducts()
    with torch.device("meta"), Other():
        fast.switch_on()
        assert torch.empty(1).device.type == "meta"
    assert torch.empty(1).device.type == "cpu"
    torch.set_default_device("meta")
    fast.switch_off()
    fast.switch_on()
    torch.set_default_device(None)
    assert torch.empty(1).device.type == "cpu"
    with Computed() as computed:
        functional.linear(random(16, 64).bfloat16(), random(32, 64).bfloat16())
    assert computed.dtypes == {torch.float32}
    fast.switch_off()
    fast.switch_off()  # does no harm
    assert _len_torch_function_stack() == 0


@pytest.mark.usefixtures("float32")
def test_offloaded_and_tied_weights_stay_what_they_are(tmp_path: Path) -> None:
    from tests.tiny_llama import save_llama

    folder = save_llama(tmp_path / "model", tied=True, dtype=torch.bfloat16)
    plain, offloaded = load(folder), load(folder)
    for module in offloaded.modules():
        if isinstance(module, nn.Linear) and module is not offloaded.lm_head:
            offload_module(module, "cpu", "cpu")
    with FastProducts():
        assert torch.equal(logits_of(offloaded), logits_of(plain))
    assert offloaded.lm_head.weight is offloaded.model.embed_tokens.weight
    assert {each.dtype for each in offloaded.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("float32")
def test_perplexity_is_computed_so(tiny_models: TinyModels, rows: Dataset) -> None:
    model = load(tiny_models("llama", torch.bfloat16))
    with Computed() as computed:
        perplexity(model, rows)
    assert computed.dtypes == {torch.float32}
    assert _len_torch_function_stack() == 0


class Watch(Modifier):
    """A later modifier that notes what its pass is of."""

    requires_calibration_data: bool = True
    _weights: set[torch.dtype] = PrivateAttr(default_factory=set)
    _activations: set[torch.dtype] = PrivateAttr(default_factory=set)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: State, event: Any, **kwargs: Any) -> None:
        self._weights.update(each.dtype for each in state.model.parameters())
        for module in state.model.modules():
            if isinstance(module, nn.Linear):
                self.register_hook(module, self._note, "forward")

    def on_calibration_end(self, state: State, event: Any, **kwargs: Any) -> None:
        self.remove_hooks()

    def _note(self, *args: Any) -> None:
        _module, (x, *_), output = args
        self._activations |= {x.dtype, output.dtype}


def test_run_computes_in_float32_and_keeps_all_dtypes(
    tiny_models: TinyModels,
    rows: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibration, trials, refit and distillation; then the checkpoint."""
    monkeypatch.setenv(VARIABLE, "float32")
    source, watch = tiny_models("llama", torch.bfloat16), Watch()
    settings: dict[str, Any] = {
        "criterion": "loss",
        "refit": True,
        "distill": {"epochs": 1},
    }
    recipe = [NBLModifier(num_layers=2, **settings), watch]
    with Computed() as computed:
        model = compress(source, recipe, rows, output_dir=str(tmp_path))
    # statistics are summed in float64
    assert torch.float32 in computed.dtypes
    assert not computed.dtypes & set(HALF)
    assert watch._weights == watch._activations == {torch.bfloat16}
    assert _len_torch_function_stack() == 0

    before, after = tensors_in(source), tensors_in(tmp_path)
    assert {each.dtype for each in after.values()} == {torch.bfloat16}
    kept = before.keys() & after.keys()
    assert len(kept) == len(before) - 5 * 2  # q, k, v, o and the norm of two layers
    changed = {name for name in kept if not torch.equal(before[name], after[name])}
    assert all(name.endswith("norm.weight") for name in changed)  # distillation
    assert len(linearized(model)) == 2


def test_maps_are_as_near_to_the_float32_models_as_the_cpus_own(
    tiny_models: TinyModels, rows: Dataset, tmp_path: Path, monkeypatch: Any
) -> None:
    def maps(model: Path, choice: str) -> Tensor:
        monkeypatch.setenv(VARIABLE, choice)
        result = compress(model, [NBLModifier(layers=[0, 2])], rows)
        weights = [result.model.layers[i].self_attn.linear.weight for i in (0, 2)]
        return torch.stack([each.detach().float() for each in weights])

    half = tiny_models("llama", torch.bfloat16)
    load(half).float().save_pretrained(tmp_path / "wide")
    exact = maps(tmp_path / "wide", "native")
    fast, native = maps(half, "float32"), maps(half, "native")
    # Both round activations to 8 bits, at the same places; where they differ is chance.
    assert (fast - exact).norm() <= 1.25 * (native - exact).norm()
    assert (native - exact).norm() < 0.1 * exact.norm()


@pytest.mark.usefixtures("float32")
def test_quantizers_behind_it_compute_so_and_a_failed_run_is_cleared_up(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    class Fail(Watch):
        def on_calibration_end(self, state: State, event: Any, **kwargs: Any) -> None:
            super().on_calibration_end(state, event, **kwargs)
            raise ZeroDivisionError

    source = tiny_models("llama", torch.bfloat16)
    with pytest.raises(ZeroDivisionError):
        compress(source, [NBLModifier(num_layers=1), Fail()], rows)
    # llm-compressor finalizes the modifiers of that run when the next one starts
    recipe = [NBLModifier(num_layers=1), *FOLLOWERS["gptq"].make()]
    with Computed() as computed:
        compress(source, recipe, rows)
    assert not computed.dtypes & set(HALF)
    assert _len_torch_function_stack() == 0
