# SPDX-License-Identifier: Apache-2.0
"""Every family of the table, from calibration to generation from the saved model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import Tensor
from transformers import AutoProcessor

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES, Architecture
from nbl_modifier.numerics import CovarianceAccumulator, nmse_bound
from nbl_modifier.records.compression import LayerResult
from tests.streams import assert_best_map, stream
from tests.tiny_llama import compress, linearized, load, logits_of
from tests.tiny_models import (
    FAMILIES,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    SLIDING_WINDOW,
    THOROUGH,
    VOCAB_SIZE,
    save_tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")

nbl_modifier.hf.register()

ROWS = [ARCHITECTURES[name] for name in THOROUGH]
CASES = [(row, kind) for row in ROWS for kind in row.inputs]
# The first layer, whose length in the KV cache positions are read from, and one of each
# kind where sliding and full attention alternate.
LAYERS = [0, 3]
# What quantizers leave alone in a model that sees.
NOT_TEXT = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


@dataclass(frozen=True)
class Family:
    """
    A finished run.

    :param row: the family
    :param kind: what the linear layers read
    :param base: the model before, its attention eager as in calibration
    :param model: the model after
    :param folder: where it was saved
    :param measured: the report's figures by layer index
    """

    row: Architecture
    kind: str
    base: Any
    model: Any
    folder: Path
    measured: dict[int, LayerResult]


def test_every_row_has_a_model() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0].model_type}-{case[1]}"
)
def family(
    request: pytest.FixtureRequest,
    rows: Dataset,
    one_thread: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Family:
    row, kind = request.param
    folder = tmp_path_factory.mktemp(row.model_type)
    source = save_tiny(folder / "base", row.model_type)
    nbl = NBLModifier(layers=LAYERS, input=kind)
    out = str(folder / "out")
    model = compress(load(source), nbl, rows, batch_size=4, output_dir=out)
    assert nbl.report is not None
    return Family(
        row,
        kind,
        load(source, attn_implementation="eager"),
        model,
        folder / "out",
        {layer.index: layer for layer in nbl.report.layers},
    )


def test_reloads_as_it_is_in_memory(family: Family) -> None:
    reloaded, info = load(family.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(reloaded).__name__ == family.row.nbl_causal_lm
    assert linearized(reloaded) == LAYERS
    # Experts are apart in memory and one weight once reloaded: float32, other sums.
    found, expected = logits_of(reloaded), logits_of(family.model)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
    assert not torch.allclose(logits_of(reloaded), logits_of(family.base))


# --- what is fitted -------------------------------------------------------------------


def test_first_layer_is_the_best_linear_map_of_what_attention_adds(
    family: Family, rows: Dataset
) -> None:
    assert_best_map(
        family.base,
        family.model,
        family.row,
        family.kind,
        family.measured[0],
        torch.tensor(rows["input_ids"]),
    )


@pytest.mark.parametrize("index", LAYERS)
def test_bound_is_that_of_the_stream(family: Family, rows: Dataset, index: int) -> None:
    tokens = torch.tensor(rows["input_ids"])
    before, after = stream(family.base, family.row, index, tokens)
    moments = CovarianceAccumulator(before.shape[1], before.shape[1])
    moments.update(before.float(), after.float())
    bound = nmse_bound(moments.finalize())
    # The sum of 32 terms of which some are small differences from 1.
    assert family.measured[index].cca_bound == pytest.approx(bound, rel=1e-3)


# --- generation -----------------------------------------------------------------------


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, VOCAB_SIZE, (2, length), generator=generator)


def generate(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    output = model.generate(inputs, do_sample=False, max_new_tokens=12, **kwargs)
    return output[:, inputs.shape[1] :]


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_is_that_without_a_cache(family: Family, cache: str | None) -> None:
    """Across the end of the sliding window, where there is one."""
    inputs = tokens(SLIDING_WINDOW - 6)
    expected = generate(family.model, inputs, use_cache=False)
    found = generate(family.model, inputs, cache_implementation=cache)
    assert torch.equal(found, expected)


def test_left_padding_changes_nothing(family: Family) -> None:
    inputs, padding = tokens(20), 9
    expected = generate(family.model, inputs[:1, padding:])
    mask = torch.ones_like(inputs)
    mask[0, :padding] = 0
    found = generate(family.model, inputs, attention_mask=mask)
    assert torch.equal(found[:1], expected)
    assert torch.equal(found[1:], generate(family.model, inputs[1:]))


# --- a model that sees ---------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llava") / "base", "llava")


def image_rows(num_rows: int = 32, length: int = 64) -> Dataset:
    """Return rows of random tokens that begin with a random image."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(2, VOCAB_SIZE, (num_rows, length), generator=generator)
    tokens[:, 1:5] = IMAGE_TOKEN
    images = torch.randn(num_rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
            "pixel_values": images.tolist(),
        }
    )


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def test_calibration_on_images_leaves_the_vision_tower_alone(
    llava: Path, tmp_path: Path
) -> None:
    """A pattern that also matches the layers of the tower means those of the text."""
    model = load(llava)
    seeing = {name: weight.clone() for name, weight in vision(model).items()}
    targets = [r"re:.*layers\.[01]\.self_attn$"]
    nbl = NBLModifier(num_layers=2, targets=targets)
    rows = image_rows()
    compress(
        model,
        nbl,
        rows,
        processor=AutoProcessor.from_pretrained(llava),
        data_collator=collate,
        output_dir=str(tmp_path / "out"),
    )
    assert nbl.report is not None
    assert nbl.report.num_tokens == 32 * 64
    assert linearized(model) == [0, 1]
    assert vision(model).keys() == seeing.keys()
    for name, weight in vision(model).items():
        assert torch.equal(weight, seeing[name]), name
    reloaded, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    inputs = collate(list(rows.select(range(2))))
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        found = reloaded(**inputs, use_cache=False).logits
        blind = {"input_ids": inputs["input_ids"].fill_(2), "use_cache": False}
        assert not torch.allclose(model(**blind).logits, expected)
    assert torch.equal(found, expected)


def test_quantized_llava_reloads_as_it_does_without_nbl(
    llava: Path, rows: Dataset, tmp_path: Path
) -> None:
    """
    transformers 5.17 takes a quantized LLaVA's vision tower and head for quantized.

    llm-compressor excepts them by the names of weights in the checkpoint, which are not
    those of modules in transformers (but are in vLLM).
    """
    missing = []
    for number, before in enumerate(([], [NBLModifier(layers=[0, 3])])):
        model, folder = load(llava), tmp_path / str(number)
        w8a8 = QuantizationModifier(scheme="W8A8", targets="Linear", ignore=NOT_TEXT)
        compress(model, [*before, w8a8], rows, output_dir=str(folder))
        done = {
            name
            for name, module in model.named_modules()
            if hasattr(module, "quantization_scheme")
        }
        text = [name for name in done if name.startswith("model.language_model.layers")]
        assert len(text) == len(done) > 0
        assert number == 0 or "model.language_model.layers.0.self_attn.linear" in done
        _, info = load(folder, output_loading_info=True)
        missing.append(info.pop("missing_keys"))
        assert not any(info.values())
    assert missing[0] == missing[1]
    assert "lm_head.weight_scale" in missing[0]
    assert not any("language_model" in name for name in missing[0])


def vision(model: Any) -> dict[str, Tensor]:
    tower: dict[str, Tensor] = model.model.vision_tower.state_dict()
    return tower | model.model.multi_modal_projector.state_dict()


# --- refused before calibration -------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "kind", "message"),
    [
        (
            "cohere",
            "residual",
            "CohereForCausalLM reads input_layernorm in its MLP, too.*got 'residual'. "
            "Use input: normalized.",
        ),
        (
            "olmo2",
            "normalized",
            "Olmo2ForCausalLM has no norm in front of attention, got 'normalized'. "
            "Use input: residual.",
        ),
    ],
)
def test_input_that_a_family_cannot_read(
    tmp_path: Path, rows: Dataset, model_type: str, kind: Any, message: str
) -> None:
    model = load(save_tiny(tmp_path / "base", model_type))
    before = logits_of(model)
    with pytest.raises(ValueError, match=message):
        compress(model, NBLModifier(num_layers=1, input=kind), rows)
    assert torch.equal(logits_of(model), before)
