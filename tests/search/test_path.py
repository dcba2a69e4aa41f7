# SPDX-License-Identifier: Apache-2.0
"""Criteria, budgets, greedy selection and refit, through real oneshot() runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset

from nbl_modifier import NBLModifier
from nbl_modifier.evaluation.texts import pack, stdlib_texts
from nbl_modifier.records.compression import LayerResult, NBLReport
from tests.followers import TinyModels
from tests.llmcompressor_plugin.test_modifier import activations, assert_map
from tests.numerics import oracle
from tests.tiny_llama import (
    DEMO_MODEL,
    Model,
    compress,
    decoder_layers,
    demo_tokenizer,
    linearized,
    load,
    ragged_rows,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Of 16 sequences, one batch each, these are held out.
HELD_OUT = [2, 6, 10, 14]
FITTED = [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]


def run(
    folder: Path, rows: Dataset, model: Model | None = None, **fields: Any
) -> tuple[Model, NBLReport]:
    modifier = NBLModifier(**fields)
    model = compress(model or load(folder), modifier, rows)
    assert modifier.report is not None
    return model, modifier.report


def layer(report: NBLReport, index: int) -> LayerResult:
    return next(result for result in report.layers if result.index == index)


def mean_nll(model: Model, rows: Dataset, masks: Sequence[Any] | None = None) -> float:
    """Return the mean negative log-likelihood of all tokens but the first, in nats."""
    total, count = 0.0, 0
    for number, tokens in enumerate(rows["input_ids"]):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        logs = logits.double().log_softmax(-1)
        for position in range(1, len(tokens)):
            if masks is None or masks[number][position]:
                total -= float(logs[position - 1, tokens[position]])
                count += 1
    return total / count


@pytest.fixture(scope="module")
def everything(llama: Path, rows: Dataset) -> NBLReport:
    """Return a report with every figure measured, held-out ones too."""
    return run(llama, rows, criterion="loss", num_layers=4)[1]


@pytest.fixture(scope="module")
def windows() -> Dataset:
    """Return Python source for the demo model, to which every replacement does harm."""
    texts = stdlib_texts("calibration")
    return pack(texts, demo_tokenizer(), seq_length=128, num_sequences=16)


# --- criteria -------------------------------------------------------------------------


def test_loss_is_that_of_the_single_replacement(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    """Layer by layer: replace it alone, and compare held-out text."""
    heldout = rows.select(HELD_OUT)
    base = mean_nll(load(llama), heldout)
    assert everything.heldout is not None
    assert everything.heldout.num_windows == 4
    assert everything.heldout.num_tokens == 4 * 63
    # float32 logits: 1e-7 of a mean of about 6
    assert math.log(everything.heldout.base) == pytest.approx(base, abs=2e-6)
    for index in range(4):
        model, _ = run(llama, rows.select(FITTED), layers=[index])
        measured = layer(everything, index)
        assert measured.loss == pytest.approx(mean_nll(model, heldout) - base, abs=2e-6)
        assert measured.score == measured.loss
    ranking = [result.loss for result in everything.ranking]
    assert ranking == sorted(ranking, key=lambda loss: (loss is None, loss))
    everywhere, _ = run(llama, rows.select(FITTED), num_layers=4)
    assert math.log(everything.heldout.replaced) == pytest.approx(
        mean_nll(everywhere, heldout), abs=2e-6
    )


def test_divergence_is_from_the_original_predictions(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    _, report = run(llama, rows, criterion="kl", num_layers=2)
    assert [result.score for result in report.ranking] == sorted(
        result.kl or 0.0 for result in report.layers
    )

    def predictions(model: Model) -> torch.Tensor:
        tokens = torch.tensor(rows.select(HELD_OUT)["input_ids"])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, :-1]
        return logits.double().log_softmax(-1)

    original = predictions(load(llama))
    for index in range(4):
        replaced = predictions(run(llama, rows.select(FITTED), layers=[index])[0])
        divergence = (original.exp() * (original - replaced)).sum(-1).mean()
        result = layer(report, index)
        # of float32 logits, with a mean of about 0.1
        assert result.kl == pytest.approx(float(divergence), abs=2e-6)
        assert result.kl == layer(everything, index).kl
        assert result.loss == layer(everything, index).loss


def test_trials_leave_nothing_behind(llama: Path, rows: Dataset) -> None:
    """The layers that are not chosen are the original ones, bit for bit."""
    original = load(llama).state_dict()
    model, report = run(
        llama, rows, criterion="loss", selection="greedy", refit=True, num_layers=1
    )
    (chosen,) = report.selected_layers
    for name, tensor in model.state_dict().items():
        if not name.startswith(
            (f"model.layers.{chosen}.self_attn", f"model.layers.{chosen}.input_")
        ):
            assert torch.equal(tensor, original[name]), name
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in vars(module) or hasattr(
            module, "_original_forward_func"
        ), name
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_cosine_is_that_of_the_stream_around_attention(
    llama: Path, rows: Dataset
) -> None:
    report = run(llama, rows, criterion="cosine", num_layers=2)[1]
    model = load(llama)
    seen: dict[int, list[float]] = {index: [] for index in range(4)}
    for index, decoder_layer in enumerate(model.model.layers):
        stream: list[Any] = []
        decoder_layer.input_layernorm.register_forward_pre_hook(
            lambda _, args, stream=stream: stream.append(args[0].double())
        )
        decoder_layer.self_attn.register_forward_hook(
            lambda _, __, output, stream=stream, index=index: seen[index].extend(
                torch.cosine_similarity(
                    stream[-1], stream[-1] + output[0].double(), dim=-1
                )
                .flatten()
                .tolist()
            )
        )
    for tokens in rows["input_ids"]:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
    expected = {index: 1 - sum(values) / len(values) for index, values in seen.items()}
    for index, value in expected.items():
        # cosines are of float32 rows
        assert layer(report, index).cosine == pytest.approx(value, abs=1e-6)
    assert [r.index for r in report.ranking] == sorted(
        expected, key=expected.__getitem__
    )


def test_residual_nmse_ranks(llama: Path, rows: Dataset) -> None:
    report = run(llama, rows, criterion="residual_nmse", num_layers=2)[1]
    scores = [result.residual_nmse for result in report.ranking]
    assert scores == sorted(scores)
    assert [result.score for result in report.ranking] == scores


def test_held_out_error_is_measured_on_other_windows(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    part = run(llama, rows.select(FITTED), num_layers=4)[1]
    fitted = activations(llama, rows.select(FITTED))
    heldout = activations(llama, rows.select(HELD_OUT))
    for result in everything.layers:
        same = layer(part, result.index)
        assert result.num_tokens == same.num_tokens == 12 * 64
        assert (result.nmse, result.cca_bound) == (same.nmse, same.cca_bound)
        assert same.heldout_nmse is None
        seen, other = fitted[result.index], heldout[result.index]
        W, b = oracle.lmmse(seen.residual, seen.output)
        expected = oracle.nmse(other.residual, other.output, W, b)
        # float64 throughout; 1e-9 leaves 1e-16 times the condition number of 1e3 room
        assert result.heldout_nmse == pytest.approx(expected, rel=1e-9)
        assert expected > result.nmse


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_predicted(llama: Path, side: str) -> None:
    lengths = [64, 40, 7, 55, 64, 21, 30, 48, 3, 64, 33, 59, 12, 61, 26, 44]
    ragged = ragged_rows(lengths)
    modifier = NBLModifier(criterion="loss", num_layers=1)
    compress(
        load(llama),
        modifier,
        ragged,
        batch_size=4,
        data_collator="padding",
        max_seq_length=None,
        processor=demo_tokenizer(padding_side=side),
    )
    report = modifier.report
    assert report is not None
    assert report.heldout is not None
    # the loader sorts by length, longest first; of four batches the third is held out
    heldout = sorted(range(16), key=lambda number: -lengths[number])[8:12]
    assert report.heldout.num_tokens == sum(lengths[i] for i in heldout) - 4
    expected = mean_nll(load(llama), ragged.select(heldout))
    # left padding shifts positions, and with them float32 rounding
    assert math.log(report.heldout.base) == pytest.approx(expected, abs=1e-5)


def test_tokens_outside_the_loss_are_not_predicted(llama: Path, rows: Dataset) -> None:
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(16, 64, generator=generator) < 0.6).long().tolist()
    masked = rows.add_column("loss_mask", masks)
    modifier = NBLModifier(criterion="loss", num_layers=1)
    compress(load(llama), modifier, masked, use_loss_mask=True)
    report = modifier.report
    assert report is not None
    assert report.heldout is not None
    heldout = [masks[number] for number in HELD_OUT]
    assert report.heldout.num_tokens == sum(sum(mask[1:]) for mask in heldout)
    expected = mean_nll(load(llama), rows.select(HELD_OUT), heldout)
    assert math.log(report.heldout.base) == pytest.approx(expected, abs=2e-6)


# --- budgets --------------------------------------------------------------------------


def test_largest_error_that_may_be_used(
    llama: Path, rows: Dataset, everything: NBLReport
) -> None:
    errors = {r.index: r.heldout_nmse or math.nan for r in everything.layers}
    order = sorted(errors, key=errors.__getitem__)
    limit = errors[order[1]]  # exactly as large is allowed
    model, report = run(llama, rows, max_nmse=limit)
    assert linearized(model) == report.selected_layers == sorted(order[:2])
    assert report.binding == f"max_nmse={limit}"
    assert f"> max_nmse={limit}" in layer(report, order[2]).reason
    assert [result.index for result in report.ranking] == sorted(
        range(4), key=lambda index: layer(report, index).cca_bound
    )
    model, report = run(llama, rows, max_nmse=limit, num_layers=1)
    best = min(order[:2], key=lambda index: layer(report, index).cca_bound)
    assert linearized(model) == [best]
    assert report.binding == "num_layers=1"
    _, report = run(llama, rows, max_nmse=limit, kv_cache_reduction=0.75)
    assert report.num_replaced == 2
    assert report.binding == f"max_nmse={limit}"
    _, report = run(llama, rows, max_nmse=100.0)
    assert report.num_replaced == 4
    assert report.binding == "all 4 candidates"


def test_perplexity_may_rise_so_far(windows: Dataset) -> None:
    """Each prefix of the ranking is measured until one is too much."""
    fields: dict[str, Any] = {
        "targets": [r"re:.*layers\.(1|7|10|12)\.self_attn"],
        "criterion": "loss",
        "max_perplexity_increase": 1e6,
    }
    heldout = run(DEMO_MODEL, windows, **fields)[1].heldout
    assert heldout is not None
    increases = [(value or math.nan) / heldout.base - 1 for value in heldout.path]
    assert len(increases) == 4
    # or the second prefix would be cut off by the first, and the test say nothing
    assert max(increases[0], 0.0) < increases[1] < increases[2], increases
    between = (increases[1] + increases[2]) / 2
    limited = fields | {"max_perplexity_increase": between}
    model, report = run(DEMO_MODEL, windows, **limited)
    assert report.num_replaced == len(linearized(model)) == 2
    assert report.binding is not None
    assert report.binding.startswith(f"max_perplexity_increase={between} (")
    assert f"{increases[2]:.4g}" in report.binding
    assert report.heldout is not None
    assert report.heldout.path == heldout.path[:2]
    assert report.heldout.replaced == heldout.path[1]
    assert report.layers[0].reason.endswith(report.binding)
    _, report = run(DEMO_MODEL, windows, **limited, num_layers=1)
    assert report.binding == "num_layers=1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_nmse": 1e-3}, r"max_nmse: no layer fits the budget 0\.001; the lowest"),
        (
            {"max_perplexity_increase": 0.0},
            r"max_perplexity_increase: no layer fits the budget 0\.0; replacing",
        ),
    ],
)
def test_nothing_fits(
    windows: Dataset, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    modifier = NBLModifier(targets=[r"re:.*layers\.1\.self_attn"], **fields)
    model = load(DEMO_MODEL)
    with pytest.raises(ValueError, match=message):
        compress(model, modifier, windows, output_dir=str(tmp_path / "out"))
    assert linearized(model) == []
    assert not (tmp_path / "out").exists()


MEASURED: list[dict[str, Any]] = [
    {"max_perplexity_increase": 0.1},
    {"criterion": "loss", "num_layers": 1},
    {"criterion": "kl", "num_layers": 1},
    {"distill_epochs": 1, "num_layers": 1},
]


@pytest.mark.parametrize("fields", MEASURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_a_finite_loss_is_refused(
    llama: Path, rows: Dataset, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    """An infinite weight, or logits that float16 cannot hold."""
    model = load(llama).to(dtype)
    head = model.get_output_embeddings().weight.data
    if dtype == torch.float16:
        head.mul_(3e4)
    else:
        head[7, 5] = math.inf
    with pytest.raises(ValueError, match="of the model as it is: must be finite"):
        run(llama, rows, model, **fields)
    assert linearized(model) == []


def breaking_at(folder: Path, *indices: int) -> Model:
    """Return a model that gives NaN when attention of these layers is replaced."""
    model = load(folder)
    for index in indices:
        layer = decoder_layers(model)[index]

        def spoil(
            _: Any, args: Any, layer: Any = layer, attention: Any = layer.self_attn
        ) -> Any:
            return args if layer.self_attn is attention else (args[0] * math.nan,)

        layer.mlp.register_forward_pre_hook(spoil)
    return model


@pytest.mark.parametrize("selection", ["one_shot", "greedy"])
@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "loss", "num_layers": 3},
        {"criterion": "kl", "num_layers": 4},
        {"max_perplexity_increase": 1e6},
        {"criterion": "loss", "max_perplexity_increase": 1e6},
    ],
)
def test_a_layer_without_a_finite_trial_is_kept(
    llama: Path, rows: Dataset, fields: dict[str, Any], selection: str
) -> None:
    model, report = run(
        llama, rows, breaking_at(llama, 2), selection=selection, **fields
    )
    assert report.selected_layers == linearized(model) == [0, 1, 3]
    assert "on held-out windows are not finite" in layer(report, 2).reason
    assert NBLReport.from_json(report.to_json()) == report


def test_no_layer_with_a_finite_trial(llama: Path, rows: Dataset) -> None:
    model = breaking_at(llama, 0, 1, 2, 3)
    for fields in ({"criterion": "loss", "num_layers": 1}, MEASURED[0]):
        with pytest.raises(ValueError, match="no layer can be replaced; layer"):
            run(llama, rows, model, **fields)
    with pytest.raises(ValueError, match=r"layers \[.\] replaced: must be finite"):
        run(llama, rows, model, num_layers=1, max_nmse=1e6)
    assert linearized(model) == []


def test_one_batch_cannot_be_split(llama: Path, rows: Dataset) -> None:
    with pytest.raises(ValueError, match=r"got one batch.*smaller batch_size"):
        compress(
            load(llama),
            NBLModifier(num_layers=1, criterion="loss"),
            rows,
            batch_size=16,
        )


def test_too_few_tokens_are_left_to_fit_on(llama: Path) -> None:
    few = token_rows(num_rows=8, length=5)  # 40 tokens for 32 dimensions, 30 to fit on
    with pytest.raises(ValueError, match=r"to fit on: 30 tokens"):
        compress(load(llama), NBLModifier(num_layers=1, criterion="loss"), few)


# --- greedy selection and refit -------------------------------------------------------


def redundant_model(folder: Path) -> Path:
    """
    Save a model whose first two attention layers do the same, and the third another.

    A sequence starts with two keys, then queries alternate with their answers: token
    ``c_i`` to query 16 after key ``a_i``, ``d_j`` to query 17 after ``b_j``. The first
    two layers each carry ``a`` forward, the last one ``b``, by attending to everything
    alike; what a linear map of the current token cannot do.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=18,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(18, 32))
        for index, (key, written) in enumerate(((0, 20), (0, 20), (4, 24))):
            attention = model.model.layers[index].self_attn
            for i in range(4):
                attention.v_proj.weight[i, key + i] = 1.0
                attention.o_proj.weight[written + i, i] = 0.05
        # Which kind of token comes next depends on the last one, by a wide margin.
        head = model.lm_head.weight
        head[4:8, 0:4] = head[16:18, 4:16] = 400.0
        head[8:12, 16] = head[12:16, 17] = 400.0
        for i in range(4):
            head[8 + i, 20 + i] = head[12 + i, 24 + i] = 800.0
    model.save_pretrained(folder)
    return folder


def keyed_rows(num_rows: int = 32, num_queries: int = 10) -> Dataset:
    """Return what the redundant model predicts; query 16 is the more frequent one."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(num_rows):
        a, b = torch.randint(4, (2,), generator=generator).tolist()
        row = [a, 4 + b]
        for _ in range(num_queries):
            first = bool(torch.rand((), generator=generator) < 0.6)
            row += [16, 8 + a] if first else [17, 12 + b]
        rows.append(row)
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )


def test_greedy_sees_what_layers_do_for_each_other(tmp_path: Path) -> None:
    """Either of two equal layers can go, but not both."""
    folder, rows = redundant_model(tmp_path / "model"), keyed_rows()
    fields: dict[str, Any] = {"num_layers": 2, "criterion": "loss"}
    _, one_shot = run(folder, rows, **fields)
    model, greedy = run(folder, rows, **fields, selection="greedy")
    assert one_shot.selected_layers == [0, 1]
    assert 2 in greedy.selected_layers == linearized(model)
    assert one_shot.heldout is not None
    assert greedy.heldout is not None
    base, alone = greedy.heldout.base, greedy.heldout.path[0]
    assert alone is not None
    assert alone < 1.1 * base  # one of the two does no harm
    assert greedy.heldout.replaced < 0.5 * one_shot.heldout.replaced
    path = [result for result in greedy.ranking if result.selected]
    first, second = (result.score for result in path)
    assert first == pytest.approx(math.log(alone / base), abs=1e-6)
    assert second == pytest.approx(math.log(greedy.heldout.replaced / alone), abs=1e-6)


def stream_in_front(model: Model, index: int, rows: Dataset) -> np.ndarray:
    """Return what decoder layer ``index`` gets, ``[num_tokens, hidden_size]``."""
    seen: list[np.ndarray] = []
    handle = model.model.layers[index].register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double().numpy())
    )
    for tokens in rows["input_ids"]:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
    handle.remove()
    return np.concatenate(seen)


@pytest.mark.parametrize("kind", ["residual", "normalized"])
def test_refit_leads_back_to_the_original_stream(
    llama: Path, rows: Dataset, kind: Literal["residual", "normalized"]
) -> None:
    plain, _ = run(llama, rows, layers=[1, 3], input=kind)
    model, report = run(llama, rows, layers=[1, 3], input=kind, refit=True)
    assert report.refit
    original = activations(llama, rows)
    # The first layer reads what it always did.
    before, after = (m.model.layers[1].self_attn.linear for m in (plain, model))
    assert torch.allclose(before.weight, after.weight, rtol=0, atol=1e-6)
    # The other one reads what the first makes of it, and makes up for the difference.
    stream = stream_in_front(model, 3, rows)
    target = original[3].residual + original[3].output - stream
    X = stream
    if kind == "normalized":
        norm = model.model.layers[3].input_layernorm
        with torch.no_grad():
            X = norm(torch.tensor(stream, dtype=torch.float32)).double().numpy()
    # W is rounded to float32, and so was each activation: 1e-6 of the entries
    assert_map(model, 3, X, target, 1e-5)
    W, b = oracle.lmmse(X, target)
    linear = plain.model.layers[3].self_attn.linear
    W0, b0 = (t.detach().double().numpy() for t in (linear.weight, linear.bias))
    assert oracle.mse(X, target, W, b) < 0.99 * oracle.mse(X, target, W0, b0)


def test_greedy_fits_what_is_left_to_the_linear_model(
    llama: Path, rows: Dataset
) -> None:
    """Of a layer chosen later: the map of what attention does there by then."""
    model, report = run(llama, rows, num_layers=2, criterion="nmse", selection="greedy")
    first, second = (result.index for result in report.ranking[:2])
    assert first < second  # or the second would read the original stream
    partly, _ = run(llama, rows, layers=[first])
    expected, again = run(llama, rows, model=partly, layers=[second])
    new, old = (m.model.layers[second].self_attn.linear for m in (model, expected))
    # 1e-6: the partly linear model's activations are float32
    assert torch.allclose(new.weight, old.weight, rtol=0, atol=1e-6)
    assert report.ranking[1].score == pytest.approx(layer(again, second).nmse, rel=1e-5)


def test_refit_helps_a_trained_model() -> None:
    """On text that nothing was fitted on, eight of sixteen layers replaced."""
    texts = stdlib_texts("calibration")
    many = pack(texts, demo_tokenizer(), seq_length=256, num_sequences=128)
    layers = [0, 2, 3, 4, 8, 9, 11, 15]
    names = [f"model.layers.{index}.self_attn" for index in layers]
    fields: dict[str, Any] = {"criterion": "loss", "refit": True}
    _, report = run(DEMO_MODEL, many, targets=names, num_layers=8, **fields)
    assert report.selected_layers == layers
    assert report.heldout is not None
    assert report.heldout.refitted is not None
    assert report.heldout.refitted < 0.99 * report.heldout.replaced


# --- presets --------------------------------------------------------------------------


def test_preset_fills_in_what_is_not_given(llama: Path, rows: Dataset) -> None:
    modifier = NBLModifier(num_layers=2, preset="best")
    assert (modifier.selection, modifier.criterion) == ("greedy", "kl_angle")
    model, report = run(llama, rows, num_layers=2, preset="best")
    spelled_out = {
        name: getattr(modifier, name)
        for name in ("criterion", "selection", "distill_epochs", "input")
    }
    same, _ = run(llama, rows, num_layers=2, **spelled_out)
    assert linearized(model) == linearized(same) == report.selected_layers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_given_fields_win_over_the_preset(logged: list[str]) -> None:
    modifier = NBLModifier(num_layers=2, preset="best", criterion="nmse", refit=True)
    assert modifier.criterion == "nmse"
    assert modifier.refit
    (said,) = (text for text in logged if "preset 'best'" in text)
    assert said.startswith("NBLModifier.criterion: 'nmse' as given, not ")


def test_preset_takes_the_input_that_a_family_has(
    tiny_models: TinyModels, rows: Dataset
) -> None:
    recipe = NBLModifier(num_layers=1, preset="best")
    compress(load(tiny_models("olmo2")), recipe, rows)
    assert recipe.input == "residual"
    with pytest.raises(ValueError, match="Use input: residual"):
        compress(
            load(tiny_models("olmo2")),
            NBLModifier(num_layers=1, preset="best", input="normalized"),
            rows,
        )
