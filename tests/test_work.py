# SPDX-License-Identifier: Apache-2.0
"""
What calibration costs, counted instead of timed.

Each number is the count of today's code, or the claim it stands for. A change that
needs more has to be meant, and to change the number here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from torch import Tensor, nn

from nbl_modifier import NBLModifier, numerics
from nbl_modifier.calibration.phases import Settings, plan
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.layer_statistics import store
from nbl_modifier.layer_statistics.moments import (
    HeldoutStatistics,
    LayerMoments,
    LayerStatistics,
)
from tests.tiny_llama import (
    DEMO_MODEL,
    compress,
    demo_tokenizer,
    load,
    save_llama,
    token_rows,
)
from tests.work import CountCalls, PeakMemory, WindowCounter, count_flops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.begin]

WIDTH = 512
ROWS, BATCHES = 96, 8


def batches(seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return stream, its norm, and attention output, ``[1, ROWS, WIDTH]`` each."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(1, ROWS, WIDTH, generator=generator)

    return [(normal(), normal(), normal()) for _ in range(BATCHES)]


def accumulate(normalized: bool) -> LayerStatistics:
    statistics = LayerStatistics("layer", WIDTH, normalized, torch.device("cpu"))
    for residual, norm, output in batches():
        statistics.update(residual, norm, output, None)
    return statistics


class CountingModifier(NBLModifier):
    """Counts the forward passes of every attention and MLP during its epoch."""

    passes: Any = None

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        self.passes = Counter()
        # torch's hooks rather than llm-compressor's: the pipeline does not disable them
        self._handles = [
            module.register_forward_pre_hook(self._count(name))
            for name, module in state.model.named_modules()
            if name.endswith(("self_attn", "mlp"))
        ]

    def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().on_calibration_end(state, event, **kwargs)

    def _count(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.passes[name] += 1

        return hook

    _handles: Any = None


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_layer_runs_once_per_batch(llama: Path, batch_size: int) -> None:
    """The pipeline's second run of every layer would find nothing changed."""
    modifier = CountingModifier(num_layers=2)
    rows = token_rows(16, 64)
    compress(load(llama), [modifier], rows, batch_size=batch_size)
    expected = {
        f"model.layers.{index}.{name}": len(rows) // batch_size
        for index in range(4)
        for name in ("self_attn", "mlp")
    }
    assert dict(modifier.passes) == expected


@pytest.mark.parametrize(("normalized", "products"), [(False, 2.5), (True, 4.25)])
def test_statistics_use_symmetry(normalized: bool, products: float) -> None:
    """
    Of ``2 n d^2`` operations per product: one for C_yx, and 3/4 for each of C_xx and
    C_yy, whose upper triangle is not computed but for blocks of 256 on the diagonal.
    """
    with count_flops() as counter:
        accumulate(normalized)
    rows = BATCHES * (ROWS + 1)  # one more per batch, for the means
    one = 2 * rows * WIDTH**2
    assert counter.get_total_flops() == products * one


PANELS = [(start, min(start + 192, WIDTH)) for start in range(0, WIDTH, 192)]


@pytest.mark.parametrize(("normalized", "factorizations"), [(False, 2), (True, 3)])
def test_factorizations_per_layer(normalized: bool, factorizations: int) -> None:
    """C_xx and C_yy of the bound; C_xx of the map where that reads something else."""
    moments = accumulate(normalized).finalize()
    with CountCalls() as counter:
        solve(moments)
    calls = counter.calls
    assert calls["aten.linalg_cholesky_ex"] == factorizations * len(PANELS)
    for costly in ("linalg_eigh", "_linalg_eigh", "_linalg_svd", "linalg_inv_ex"):
        assert f"aten.{costly}" not in calls


@pytest.mark.parametrize(
    ("normalized", "factorizations", "cubes"), [(False, 2, 3 + 2), (True, 3, 5 + 2)]
)
def test_solving_takes_a_few_matrix_products(
    normalized: bool, factorizations: int, cubes: float
) -> None:
    """
    In units of ``d^3``: 1 per triangular solve (three; five with the normalized input),
    2 for the product that measures the error, 1/3 per factorization, to which panels
    add what they compute above the diagonal, a few hundredths at widths of models. What
    is of order ``d^2`` is less than a hundredth of it here.
    """
    factorization = sum(
        2 * (WIDTH - start) * (end - start) * start  # the columns before
        + (end - start) ** 2 * (WIDTH - end)
        + (end - start) ** 3 / 3
        for start, end in PANELS
    )
    assert factorization < 1.31 * WIDTH**3 / 3
    cubes += factorizations * factorization / WIDTH**3
    moments = accumulate(normalized).finalize()
    with count_flops() as counter:
        solve(moments)
    assert counter.get_total_flops() / WIDTH**3 == pytest.approx(cubes, rel=0.01)


def solve(moments: LayerMoments) -> None:
    """What calibration asks of one layer's statistics."""
    linear_map = numerics.solve_attention(moments.residual).linear_map
    if moments.normalized is not None:
        linear_map = numerics.solve_lmmse(moments.normalized)
    numerics.nmse(moments.normalized or moments.residual, linear_map)


@pytest.mark.parametrize(("normalized", "squares"), [(False, 2.0), (True, 3.5)])
def test_statistics_memory_does_not_grow_with_tokens(
    normalized: bool, squares: float
) -> None:
    """
    In units of ``d^2`` float64 values: 1/2 for each of the symmetric C_xx and C_yy, 1
    for C_yx. Besides, two batches in float64 and a square on the diagonal.
    """
    with PeakMemory() as memory:
        statistics = accumulate(normalized)
    expected, vectors = squares * WIDTH**2 * 8, 32 * WIDTH * 8
    temporary = 2 * (ROWS + 1) * WIDTH * 8 + 256**2 * 8
    assert expected <= memory.alive < expected + vectors
    assert memory.peak < expected + temporary + vectors
    assert statistics.num_tokens == BATCHES * ROWS


@pytest.mark.parametrize(("normalized", "squares"), [(False, 3.5), (True, 5.0)])
def test_statistics_memory_with_held_out_tokens(
    normalized: bool, squares: float
) -> None:
    """What ``preset: best`` has in flight: ``5 d^2`` float64 values, of one layer."""
    with PeakMemory() as memory:
        statistics = accumulate(normalized)
        held_out = HeldoutStatistics("layer", WIDTH, normalized, torch.device("cpu"))
        for residual, norm, output in batches():
            held_out.update(residual, norm, output, None)
    expected = squares * WIDTH**2 * 8
    assert expected <= memory.alive < expected + 64 * WIDTH * 8
    whole = statistics.finalize()
    fitted = whole.normalized or whole.residual
    assert torch.equal(held_out.finalize().cov_yx, fitted.cov_yx)


@pytest.mark.parametrize(("normalized", "squares"), [(False, 7), (True, 9)])
def test_memory_to_solve_one_layer(normalized: bool, squares: int) -> None:
    """Three or five moments, four factors and right-hand sides, and two panels."""
    statistics = accumulate(normalized)
    with PeakMemory() as memory:
        solve(statistics.finalize())
    assert memory.peak <= (squares * WIDTH + 2 * 192 + 64) * WIDTH * 8


def test_only_one_layer_is_in_flight(tmp_path: Path) -> None:
    """The pipeline finishes a layer before it starts the next."""
    peaks = set()
    for num_layers in (2, 5):
        folder = save_llama(tmp_path / str(num_layers), num_layers=num_layers)
        with PeakMemory() as memory:
            compress(load(folder), [NBLModifier(num_layers=1)], token_rows())
        peaks.add(memory.peak)
    assert len(peaks) == 1


# Where the chosen layers are known before they are chosen, so is the cost.
KNOWN: list[dict[str, Any]] = [
    {"num_layers": 2},
    {"num_layers": 2, "criterion": "loss"},
    {"num_layers": 2, "max_nmse": 1.0},
    {"num_layers": 2, "max_perplexity_increase": 10.0},
    {"layers": [1, 3], "refit": True},
    {
        "num_layers": 2,
        "targets": [r"re:.*layers\.[02]\..*"],
        "refit": True,
        "criterion": "kl",
        "input": "normalized",
    },
    {"layers": [1, 2], "distill": {"epochs": 1}},
    {"layers": [1, 2], "distill": {"epochs": 1, "rate": 0.01}},
    {"num_layers": 2, "criterion": "kl", "copying": True},
    {"layers": [1, 2], "distill": {"epochs": 1, "rate": 0.01}, "copying": True},
]


@pytest.mark.parametrize("fields", KNOWN, ids=str)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_as_many_forward_passes_as_stated(
    llama: Path, fields: dict[str, Any], batch_size: int, logged: list[str]
) -> None:
    model, rows = load(llama), token_rows(16, 64)
    counter, modifier = WindowCounter(model), NBLModifier(**fields)
    compress(model, [modifier], rows, batch_size=batch_size)
    cost = modifier._run.progress.cost
    assert counter.windows == sum(phase.layers for phase in cost.phases)
    assert modifier._run.progress.passes == cost.passes == counter.windows / (4 * 16)
    said = next(line for line in logged if line.startswith("NBL will take about"))
    assert f"{cost.passes:.1f} forward passes over 16 windows" in said
    assert "with 1,024 tokens" in said


def test_as_many_forward_passes_as_planned_for_what_was_chosen(llama: Path) -> None:
    """Greedy selection costs what the layers that are left to measure cost."""
    model = load(llama)
    counter = WindowCounter(model)
    modifier = NBLModifier(num_layers=3, criterion="nmse", selection="greedy")
    compress(model, [modifier], token_rows(16, 64))
    assert modifier.report is not None
    order = [layer.index for layer in modifier.report.ranking if layer.selected]
    settings = Settings(4, 16, 0, candidates=range(4), count=3, greedy=True)
    expected = sum(phase.layers for phase in plan(settings, order))
    assert counter.windows == expected
    assert modifier._run.progress.passes == expected / (4 * 16)
    assert modifier._run.progress.cost.passes == pytest.approx(expected / 64, rel=0.25)


def test_passes_that_statistics_spare_are_not_counted(
    llama: Path, tmp_path: Path
) -> None:
    rows = token_rows(16, 64)
    fields: dict[str, Any] = {"num_layers": 2, "criterion": "kl"}
    kept = NBLModifier(statistics=str(tmp_path), **fields)
    compress(load(llama), [kept], rows)
    model = load(llama)
    counter = WindowCounter(model)
    modifier = NBLModifier(statistics=str(tmp_path), **fields)
    compress(model, [modifier], rows)
    assert 0 < modifier._run.progress.passes == counter.windows / (4 * 16)


def test_preset_best_takes_about_as_many_forward_passes_as_stated() -> None:
    """How many layers greedy selection tries again depends on the model."""
    texts = stdlib_texts("calibration")
    source = pack(texts, demo_tokenizer(), seq_length=128, num_sequences=32)
    model = load(DEMO_MODEL)
    counter = WindowCounter(model)
    modifier = NBLModifier(num_layers=4, preset="best")
    compress(model, [modifier], source)
    cost = modifier._run.progress.cost
    stated = sum(phase.layers for phase in cost.phases)
    assert modifier._run.progress.passes == counter.windows / (16 * len(source))
    assert counter.windows == pytest.approx(stated, rel=0.3)
    assert counter.windows / (16 * len(source)) < 25


@pytest.mark.parametrize(
    "fields", [{}, {"input": "normalized"}, {"max_nmse": 5.0}], ids=str
)
def test_as_much_memory_as_stated(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Besides two batches in float64, and what two panels of a factor take."""
    folder = save_llama(tmp_path / "wide", hidden_size=256, num_layers=2)
    modifier = NBLModifier(num_layers=1, **fields)
    with PeakMemory() as memory:
        compress(load(folder), [modifier], token_rows(32, 64))
    stated = modifier._run.progress.cost.statistics_bytes
    other = (2 * (64 + 1) + 3 * 192) * 256 * 8
    assert 0.9 * stated < memory.peak < stated + other


@pytest.mark.parametrize(
    ("fields", "factorizations"), [({}, 2), ({"input": "normalized"}, 3)], ids=str
)
def test_a_choice_from_statistics_takes_what_solving_takes(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    factorizations: int,
) -> None:
    """Each file is read once, each layer is solved once, and the model never runs."""
    kept = NBLModifier(num_layers=1, statistics=str(tmp_path), **fields)
    compress(load(llama), [kept], token_rows(16, 64))
    read = Counter[str]()
    original = store.load_file

    def counted(path: Path) -> dict[str, Tensor]:
        read[path.name] += 1
        return original(path)

    monkeypatch.setattr(store, "load_file", counted)
    model = load(llama)
    windows = WindowCounter(model)
    modifier = NBLModifier(num_layers=2, statistics=str(tmp_path), **fields)
    with CountCalls() as counter:
        oneshot(model=model, recipe=modifier)
    assert modifier.report is not None
    assert windows.windows == 0
    assert read == {f"layer-{index:05}.safetensors": 1 for index in range(4)}
    assert counter.calls["aten.linalg_cholesky_ex"] == 4 * factorizations
    for costly in ("linalg_eigh", "_linalg_eigh", "_linalg_svd", "linalg_inv_ex"):
        assert f"aten.{costly}" not in counter.calls
