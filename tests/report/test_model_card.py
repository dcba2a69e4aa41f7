# SPDX-License-Identifier: Apache-2.0
"""The card says what the checkpoint is and how to load it, and gives no path away."""

import re
from pathlib import Path

import pytest
import yaml

from nbl_modifier.report.model_card import model_card, quantization_of
from nbl_modifier.report.tables import layers_table
from tests.report.report_factory import make_report

NAME = "NBLLlamaForCausalLM"


def front_matter(card: str) -> dict[str, object]:
    """Return the YAML between the first two ``---`` lines."""
    opening, header, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(header)


def test_front_matter_is_what_the_hub_reads() -> None:
    header = front_matter(model_card(make_report(), NAME, None))
    assert header["library_name"] == "transformers"
    assert header["base_model"] == "some-organization/some-model"
    assert "nbl-modifier" in header["tags"]  # type: ignore[operator]


@pytest.mark.parametrize("model", ["/home/someone/models/llama", "models/x/llama"])
def test_local_model_gives_its_name_only(model: str) -> None:
    card = model_card(make_report(model=model), NAME, None)
    assert "base_model" not in front_matter(card)
    assert "llama with 2 of 4 attention layers replaced" in card
    assert str(Path(model).parent) not in card


def test_card_describes_the_checkpoint() -> None:
    report = make_report()
    card = model_card(report, NAME, None)
    for words in (
        "layers replaced: 0, 2 ",
        "replaced by one linear map each. Made with",
        f"`{NAME}`",
        "`nbl_llama`",
        "50.0 %",
        "2 times the tokens",
        "| perplexity base | 14.500 |",
        "| held-out tokens | 16,320 |",
        layers_table(report).to_markdown(),
        "NBLModifier: {num_layers: 2}",
        "nbl_modifier.hf.register()",
        "vllm serve",
        "pip install nbl-modifier",
        "contains custom code which must be executed",
        "2505.21077",
        "python 3.11.7, torch 2.13.0",
    ):
        # cells are padded
        assert words in card or words in re.sub(" +", " ", card), words
    assert "quantiz" not in card


def test_quantization_is_named_and_tagged() -> None:
    card = model_card(make_report(), NAME, "compressed-tensors pack-quantized")
    assert "- quantization: compressed-tensors pack-quantized\n" in card
    assert "compressed-tensors" in front_matter(card)["tags"]  # type: ignore[operator]


def test_card_without_recipe_and_evaluation() -> None:
    card = model_card(make_report(recipe=None, evaluation=None), NAME, None)
    assert "```yaml" not in card
    assert "| figure " not in card


def test_all_layers_replaced_divides_by_nothing() -> None:
    card = model_card(make_report(selected_layers=[0, 1, 2, 3]), NAME, None)
    assert re.search(r"0 of 4 layers keep one; .*: 0\.0 %", card)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                }
            },
            "compressed-tensors pack-quantized",
        ),
        ({"quantization_config": {"bits": 4}}, "unknown"),
    ],
)
def test_quantization_of(config: dict[str, object], expected: str | None) -> None:
    assert quantization_of(config) == expected


def test_card_of_low_rank_maps() -> None:
    report = make_report(kind="block", rank=16)
    card = model_card(report, NAME, None)
    assert "2 of 4 blocks replaced by one linear map of rank 16 each. Made" in card
    assert ", 2 blocks linear" in card


def test_card_of_a_shorter_model_needs_no_package() -> None:
    report = make_report(kind="block", method="drop")
    card = model_card(report, "LlamaForCausalLM", None)
    assert "with 2 of 4 blocks dropped. Made with" in card
    assert "`model_type` `llama`" in card
    assert "layers dropped: 0, 2 " in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "vllm serve" in card
    assert "pip install" not in card
    assert "custom code" not in card
