# SPDX-License-Identifier: Apache-2.0
"""A job for an engine, made by hand."""

from typing import Any

from nbl_modifier.benchmark.serving import Job


def make_job(**changes: Any) -> Job:
    """Return a job for transformers in float32; ``changes`` are fields."""
    fields: dict[str, Any] = {
        "model": "a model",
        "engine": "transformers",
        "dtype": "float32",
        "random_weights": False,
        "attention": "eager",
        "max_model_len": 64,
        "max_batch": 2,
        "vocab_size": 128,
        "has_attention": True,
        "weight_bytes": 1e6,
        "eager": False,
        "kv_cache_gib": None,
        "memory_fraction": 0.9,
        "engine_args": {},
    }
    return Job(**{**fields, **changes})
