"""What a linearized model takes while vLLM builds it: no attention but what is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_modifier.architectures import architecture_of
from nbl_modifier.hf.configuration_nbl import LinearizedLayer, nbl_config_block

pytestmark = pytest.mark.requires_vllm

HIDDEN, NUM_LAYERS = 512, 8
LINEARIZED = [0, 1, 3, 4, 5, 7]
ENGINE = {"dtype": "float32", "skip_tokenizer_init": True}
# Queries and output of 512 x 512, keys and values of the same width.
ATTENTION_BYTES = 4 * HIDDEN * HIDDEN * 4
# Tables of sines, masks and the like.
SMALL_BYTES = 2**20


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Return a function that writes the ``config.json`` of a model without weights."""
    from transformers import LlamaConfig

    def write(linearized: bool) -> Path:
        directory = tmp_path_factory.mktemp("shape")
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=256,
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
        ).to_dict()
        if linearized:
            family = architecture_of("llama")
            layers = dict.fromkeys(LINEARIZED, LinearizedLayer(input="residual"))
            config |= {
                "model_type": family.nbl_model_type,
                "architectures": [family.nbl_causal_lm],
                "nbl_config": nbl_config_block(layers),
            }
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return directory

    return write


def test_attention_is_not_built(
    shape: Callable[[bool], Path],
    raw: Callable[..., Any],
    record_property: Callable[[str, object], None],
) -> None:
    """
    At no moment is there more than the finished model.

    One attention layer exists at a time, before there are any maps.

    Building all attention first, as the plugin does where it cannot do better, is what
    the measurement must notice.
    """

    def measure(linearized: bool, **fields: Any) -> dict[str, int]:
        result, _ = raw(shape(linearized), engine=ENGINE, measure_init=True, **fields)
        assert result.pop("error") is None
        return dict(result)

    base, ours = measure(False), measure(True)
    all_built = measure(True, sabotage="build_attention")
    for name, measured in {"base": base, "nbl": ours, "all_built": all_built}.items():
        record_property(f"{name}_peak_bytes", measured["peak_bytes"])
    assert ours["parameter_bytes"] == all_built["parameter_bytes"]
    assert ours["bytes"] <= ours["parameter_bytes"] + SMALL_BYTES
    assert ours["peak_bytes"] <= ours["bytes"] + SMALL_BYTES
    # Less than the base model by far: a map has a quarter of attention's weights.
    saved = len(LINEARIZED) * ATTENTION_BYTES * 3 // 4
    assert ours["peak_bytes"] <= base["peak_bytes"] - saved + SMALL_BYTES
    assert all_built["peak_bytes"] >= base["peak_bytes"]
