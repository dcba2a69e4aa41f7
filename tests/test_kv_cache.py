# SPDX-License-Identifier: Apache-2.0
"""The size of the KV cache is the formula's; what is not known is refused."""

from typing import Any

import pytest

from nbl_modifier.kv_cache import KVCache, format_bytes

# meta-llama/Llama-3.1-8B
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "dtype": "bfloat16",
}
GIB = 1024**3


def test_size_is_that_of_the_formula() -> None:
    cache = KVCache.from_config(LLAMA)
    # batch x length x layers x (key, value) x heads x head size x bytes
    assert cache.size(8192, 4) == 4 * 8192 * 32 * 2 * 8 * 128 * 2 == 4 * GIB


def test_linearized_layers_have_none() -> None:
    config = LLAMA | {"nbl_config": {"layers": {str(i): {} for i in range(12)}}}
    base = KVCache.of_base_model(config, 32)
    cache = KVCache.from_config(config)
    assert cache == base.without(range(12))
    assert cache.size(100) == base.size(100) * 20 / 32
    assert cache.is_uniform


def test_dropped_blocks_count_in_the_base_model() -> None:
    config = LLAMA | {"num_hidden_layers": 28}
    sizes = [KVCache.from_config(config).size(64), KVCache.from_config(LLAMA).size(64)]
    assert sizes[0] == sizes[1] * 28 / 32
    assert KVCache.of_base_model(config, 32).size(64) == sizes[1]


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
        ({"kv_lora_rank": 512}, "latent KV cache"),
        ({"sliding_window": 9, "layer_types": ["full_attention"]}, "1 of 32 layers"),
    ],
)
def test_unknown_size_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache.from_config(LLAMA | change)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (100 * GIB, "100 GiB")],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text
