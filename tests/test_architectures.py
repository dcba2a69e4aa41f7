# SPDX-License-Identifier: Apache-2.0
"""The table of families against the classes of transformers that it names."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from nbl_modifier.architectures import ARCHITECTURES, Architecture, architecture_of
from tests.tiny_llama import load
from tests.tiny_models import save_tiny, with_attention

ROWS = pytest.mark.parametrize(
    "row", ARCHITECTURES.values(), ids=lambda r: r.model_type
)


def test_llama_is_supported() -> None:
    assert "llama" in ARCHITECTURES


@ROWS
def test_names_exist_in_transformers(row: Architecture) -> None:
    causal_lm = getattr(transformers, row.causal_lm)
    assert causal_lm.config_class.model_type == row.model_type
    assert issubclass(
        getattr(transformers, row.base_model), transformers.PreTrainedModel
    )


@ROWS
def test_names_of_linearized_models_are_not_taken(row: Architecture) -> None:
    assert row.nbl_model_type not in transformers.CONFIG_MAPPING._mapping
    assert not hasattr(transformers, row.nbl_causal_lm)
    assert not hasattr(transformers, row.nbl_base_model)


def test_names_of_llama() -> None:
    """Fixed for ever: they are written into checkpoints."""
    row = ARCHITECTURES["llama"]
    assert row.nbl_model_type == "nbl_llama"
    assert row.nbl_causal_lm == "NBLLlamaForCausalLM"
    assert row.nbl_base_model == "NBLLlamaModel"


@ROWS
def test_paths_lead_to_attention_and_norms(row: Architecture, tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "model", row.model_type, hidden_size=64))
    assert type(model).__name__ == row.causal_lm
    assert type(model.base_model).__name__ == row.base_model
    layers = model.get_submodule(row.layers)
    assert len(layers) == 4
    for index in with_attention(row.model_type, len(layers)):
        layer = layers[index]
        attention = model.get_submodule(row.attention_name(index))
        assert attention is layer.get_submodule(row.attention)
        assert "o_proj" in dict(attention.named_children())
        for norm in (row.input_norm, row.post_norm):
            assert norm is None or layer.get_submodule(norm).weight.shape == (64,)
        if row.output_scale is not None:
            assert isinstance(getattr(layer, row.output_scale), float)


def test_folded_norms() -> None:
    """Those in front that a map of the residual stream skips, and those behind."""

    def folded(model_type: str) -> list[tuple[str, ...]]:
        row = ARCHITECTURES[model_type]
        return [row.folded_norms(kind) for kind in ("residual", "normalized")]

    assert folded("llama") == [("input_layernorm",), ()]
    behind = "post_attention_layernorm"
    assert folded("gemma2") == [("input_layernorm", behind), (behind,)]
    assert folded("olmo2") == [(behind,), (behind,)]
    # its MLP needs the norm
    assert folded("cohere") == [(), ()]


def test_lookup_by_either_model_type() -> None:
    row = ARCHITECTURES["llama"]
    assert architecture_of("llama") is row
    assert architecture_of("nbl_llama") is row


@pytest.mark.parametrize("model_type", ["gpt2", "nbl_gpt2", "", "nbl_", "Llama"])
def test_unknown_family_is_refused_with_the_supported_ones(model_type: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        architecture_of(model_type)
    message = str(error.value)
    assert repr(model_type) in message
    assert ", ".join(sorted(ARCHITECTURES)) in message
    assert "nbl_modifier/architectures.py" in message


def test_attention_name_follows_the_paths() -> None:
    row = replace(ARCHITECTURES["llama"], layers="decoder.blocks", attention="attn")
    assert row.attention_name(7) == "decoder.blocks.7.attn"
