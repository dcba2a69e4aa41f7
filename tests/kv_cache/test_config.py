# SPDX-License-Identifier: Apache-2.0
"""What a configuration says of each layer's cache; what is not known is refused."""

from __future__ import annotations

from typing import Any

import pytest

from nbl_modifier.kv_cache import KVCache, LayerCache
from tests.kv_cache.shapes import GATED_DELTA_NET, LLAMA


def test_head_dim_goes_before_the_hidden_size() -> None:
    config = LLAMA | {"head_dim": 256}
    assert KVCache.from_config(config).size(1) == 2 * KVCache.from_config(LLAMA).size(1)


def test_multi_head_attention_caches_every_head() -> None:
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert KVCache.from_config(config).size(1) == 4 * KVCache.from_config(LLAMA).size(1)


def test_quantized_cache_is_that_of_the_checkpoint_only() -> None:
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    config = LLAMA | {"quantization_config": scheme}
    assert KVCache.from_config(config).size(1) * 2 == KVCache.from_config(LLAMA).size(1)
    assert KVCache.of_base_model(config, 32) == KVCache.from_config(LLAMA)


def test_sliding_layers_keep_their_window() -> None:
    kinds = ["sliding_attention", "full_attention"] * 16
    cache = KVCache.from_config(LLAMA | {"sliding_window": 100, "layer_types": kinds})
    assert not cache.is_uniform
    per_token = KVCache.from_config(LLAMA).size(1) / 32
    assert cache.size(50) == 32 * 50 * per_token
    assert cache.size(300) == (16 * 100 + 16 * 300) * per_token


def test_sliding_window_that_is_switched_off() -> None:
    config = LLAMA | {"sliding_window": 100, "use_sliding_window": False}
    assert KVCache.from_config(config) == KVCache.from_config(LLAMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
        ({"layer_types": ["hyena"] * 32}, "layer_types has hyena"),
        ({"layer_types": ["mamba"] * 32}, "no mamba_n_heads"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "2 of 32 layers"),
    ],
)
def test_unknown_size_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache.from_config(LLAMA | change)


def test_latent_keys_and_values_count_once() -> None:
    """DeepSeek V3: 512 numbers that all heads share, and a key of 64 for positions."""
    cache = KVCache.from_config(LLAMA | {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert cache.size(1) == 32 * 576 * 2


def test_layers_may_be_of_different_size_or_share_an_earlier_one() -> None:
    """Gemma 4, as transformers writes it and as it was published."""
    kinds = ["sliding_attention", "full_attention"] * 16
    config = LLAMA | {"head_dim": 128, "sliding_window": 64, "layer_types": kinds}
    special = {f"{i:02}": {"head_dim": 512} for i in range(1, 32, 2)}
    cache = KVCache.from_config(config | {"per_layer_config": special})
    assert cache == KVCache.from_config(config | {"global_head_dim": 512})
    small = KVCache.from_config(config)
    assert cache.size(64) == small.size(64) * (1 + 4) / 2
    shared = KVCache.from_config(config | {"num_kv_shared_layers": 30})
    assert shared == small.without(range(2, 32))


def test_recurrent_state_of_published_shapes() -> None:
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config = LLAMA | {
        "layer_types": kinds * 8,
        "linear_num_value_heads": 48,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    cache = KVCache.from_config(config)
    assert cache.layers[0] == GATED_DELTA_NET
    assert cache.layers[3] == LayerCache(4096)
    granite = {
        "mamba_n_heads": 128,
        "mamba_d_head": 64,
        "mamba_d_state": 256,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
    }
    kinds = ["mamba", "attention"] * 16
    first = KVCache.from_config(LLAMA | granite | {"layer_types": kinds}).layers[0]
    assert first == LayerCache(0, None, 3 * (8192 + 512) * 2 + 8192 * 256 * 2, 3)


def test_sizes_of_a_nested_configuration_are_found() -> None:
    """A vision-language model's: sizes inside, replaced layers outside."""
    nested = {"text_config": LLAMA | {"num_kv_shared_layers": 2}}
    linearized: dict[str, Any] = {"nbl_config": {"layers": {"0": {}}}}
    cache = KVCache.from_config(nested | linearized)
    assert cache == KVCache.from_config(LLAMA).without([0, 30, 31])
