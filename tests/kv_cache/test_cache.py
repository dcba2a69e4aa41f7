# SPDX-License-Identifier: Apache-2.0
"""The size of the KV cache is the formula's, and what vLLM allots its own."""

import pytest

from nbl_modifier.kv_cache import Engine, KVCache, LayerCache, format_bytes
from tests.kv_cache.shapes import GATED_DELTA_NET, LLAMA

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


# --- as vLLM allots it ----------------------------------------------------------------


def hybrid(full: int, other: int, kind: LayerCache, per_token: float) -> KVCache:
    """Return the cache of a model whose layers 0 to ``full`` keep every token."""
    return KVCache((LayerCache(per_token),) * full + (kind,) * other, 16)


def sliding(full: int, other: int, window: int, per_token: float = 4096) -> KVCache:
    return hybrid(full, other, LayerCache(4096, window), per_token)


SHAPES = {
    "Gemma-2-9B": sliding(21, 21, 4096),
    "Gemma-3-27B": sliding(10, 52, 1024),
    "gpt-oss-20b": sliding(12, 12, 128),
    "OLMo-3-7B": sliding(8, 24, 4096),
    "Gemma-4-31B": sliding(10, 50, 1024, per_token=2048),
    "Qwen3.5-27B": hybrid(16, 48, GATED_DELTA_NET, 4096),
}


@pytest.mark.parametrize(
    ("model", "full", "other", "at_8k", "at_128k"),
    [
        ("Gemma-2-9B", 6, 0, 1.000, None),
        ("Gemma-2-9B", 3, 3, 1.167, None),
        ("Gemma-2-9B", 12, 0, 1.166, None),
        ("Gemma-3-27B", 1, 0, 1.11, 1.11),
        ("Gemma-3-27B", 0, 8, 1.17, 1.05),
        ("gpt-oss-20b", 3, 0, 1.000, 1.000),
        ("gpt-oss-20b", 3, 3, 1.33, 1.33),
        ("OLMo-3-7B", 1, 0, 0.914, 1.07),
        ("Gemma-4-31B", 2, 0, 0.917, 1.07),
        ("Qwen3.5-27B", 1, 0, 0.996, 1.06),
        ("Qwen3.5-27B", 8, 0, 1.65, 1.97),
        ("Qwen3.5-27B", 0, 12, 1.00, 1.00),
    ],
)
def test_sequences_that_fit_as_vllm_0_33_computes_them(
    model: str, full: int, other: int, at_8k: float, at_128k: float | None
) -> None:
    """
    Times as many as before, by vLLM's own functions, which were run for these shapes,
    without a prefix cache.

    Their figures are rounded to two digits, those below 1 and of Gemma 2 to three.
    """
    base = SHAPES[model]
    first = base.layers.count(base.layers[0])
    cache = base.without([*range(full), *range(first, first + other)])
    for length, expected in ((8192, at_8k), (131072, at_128k)):
        if expected is not None:
            engine = Engine(prefix_caching=False)
            found = base.allotted(length, engine) / cache.allotted(length, engine)
            assert found == pytest.approx(expected, abs=0.006)


def test_cached_prefixes_take_more_states() -> None:
    """A full layer, two of Mamba 2: 2 blocks of 128 tokens, 3 of each state."""
    per_token = 4096.0
    state = LayerCache(0, None, 100 * per_token, 3)
    cache = KVCache((LayerCache(per_token), state, state), 16)
    page = 128 * per_token
    assert cache.plan(256, Engine(128)) == (page, 2 + 3 + 3)
    assert cache.plan(256, Engine(128, prefix_caching=False)) == (page, 2 + 1 + 1)


def test_layers_of_one_kind_are_allotted_what_they_keep_in_whole_blocks() -> None:
    cache = KVCache.from_config(LLAMA)
    assert cache.allotted(8192) == cache.size(8192)
    assert cache.allotted(8193) == cache.size(8192 + 16)
    assert cache.without(range(8)).allotted(8192) == cache.allotted(8192) * 3 / 4
    assert cache.without(range(32)).allotted(8192) == 0
    window = KVCache.from_config(LLAMA | {"sliding_window": 1024})
    kept = 1023 + 8192 + 1  # in whole blocks, and one in which the window begins
    assert window.allotted(131072) == window.size(1) * (kept + 16)


def test_capacity_is_in_whole_blocks() -> None:
    cache = KVCache.from_config(LLAMA)
    engine = Engine(block_size=128)
    assert cache.capacity(GIB, 8192, engine) == GIB / cache.size(1)
    assert cache.capacity(GIB - 1, 8192, engine) == GIB / cache.size(1) - 128


def test_fewest_layers_of_each_kind() -> None:
    base = SHAPES["Gemma-2-9B"]
    full, other = base.layers[0], base.layers[-1]
    limit = 0.9 * base.allotted(8192)
    assert base.fewest(range(42), limit, 8192) == {full: 3, other: 3}
    # 12 and 21 are in groups of 12: one of 512 blocks, two of 513, 14 % less
    assert base.fewest(range(21), limit, 8192) == {full: 9}
    assert base.fewest(range(5), limit, 8192) is None
    # one layer is as good as any other, and it frees more the fewer there are
    gemma3 = SHAPES["Gemma-3-27B"]
    limit = 0.95 * gemma3.allotted(8192)
    assert gemma3.fewest(range(62), limit, 8192) == {full: 1, gemma3.layers[-1]: 0}


def test_recurrent_layers_are_never_among_them() -> None:
    base = SHAPES["Qwen3.5-27B"]
    attention = base.layers[0]
    limit = 0.5 * base.allotted(131072)
    assert base.fewest(range(64), limit, 131072) == {attention: 9}
    assert base.fewest(range(16, 64), limit, 131072) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (100 * GIB, "100 GiB")],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text
