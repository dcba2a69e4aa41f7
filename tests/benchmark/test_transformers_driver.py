# SPDX-License-Identifier: Apache-2.0
"""A model in transformers: its cache, measured, and its times."""

from pathlib import Path

import pytest

from nbl_modifier.benchmark.transformers_driver import TransformersDriver
from nbl_modifier.records.speed import SpeedReport
from tests.benchmark.jobs import make_job


def test_cache_is_measured_as_predicted(together: SpeedReport) -> None:
    base, compressed = together.base, together.compressed
    assert base.linearized == []
    assert compressed.linearized == [0, 2]
    # 4 layers, 2 heads of 8, keys and values, float32
    assert base.kv_bytes_per_token == 4 * 2 * 8 * 2 * 4
    assert base.measured_kv_bytes_per_token == base.kv_bytes_per_token
    # transformers counts tokens by one zero each for key and value of a linear layer.
    counters = 2 * 2 * 4
    assert compressed.kv_bytes_per_token == base.kv_bytes_per_token / 2
    assert (
        compressed.measured_kv_bytes_per_token
        == compressed.kv_bytes_per_token + counters
    )


@pytest.mark.parametrize("random_weights", [False, True])
def test_driver_is_asked_directly(
    models: tuple[Path, Path], random_weights: bool
) -> None:
    job = make_job(model=str(models[1]), random_weights=random_weights)
    driver = TransformersDriver(job)
    described = driver.describe()
    assert described["architecture"] == "NBLLlamaForCausalLM"
    assert described["kv_cache_tokens"] is None  # nothing is allotted in advance
    assert described["device"]
    timing = driver.measure(batch=2, context=16, generate=4, seed=1)
    assert timing.decode_steps == 4
    assert timing.prefill_seconds > 0
    assert timing.decode_seconds > 0
    # tokens in the cache while 4 more are generated: 17, 18, 19 and 20 but for the
    # step's own; their mean is 18.5
    assert timing.cache_tokens == 18.5
