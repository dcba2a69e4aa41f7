# SPDX-License-Identifier: Apache-2.0
"""
Size of the KV cache from a model's ``config.json``, as vLLM allots it.

Standard library only.
"""

from .cache import KVCache, format_bytes
from .config import RECURRENT
from .layers import Engine, LayerCache

__all__ = ["RECURRENT", "Engine", "KVCache", "LayerCache", "format_bytes"]
