# SPDX-License-Identifier: Apache-2.0
"""Configurations that the tests of the KV cache share."""

from __future__ import annotations

from typing import Any

from nbl_modifier.kv_cache import LayerCache

#: meta-llama/Llama-3.1-8B
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "dtype": "bfloat16",
}


#: 48 value heads of 128 x 128 in float32, and what a convolution remembers.
GATED_DELTA_NET = LayerCache(0, None, 48 * 128 * 128 * 4 + 3 * 10240 * 2, 2)
