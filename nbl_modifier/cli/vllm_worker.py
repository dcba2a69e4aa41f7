# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine: the process that ``nbl generate`` starts for each model."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbl_modifier.worker import Connection


def main(job: dict[str, Any], connection: Connection) -> None:
    """
    Answer what `generate.Generation` holds besides the model's name.

    :param job: model, prompts, max_tokens, dtype, max_model_len
    :param connection: to answer by
    """
    # The engine in this process: its configuration is then complete here.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # 1 GiB of KV cache, and no core claimed that another process may be using
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    start = time.perf_counter()
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        enforce_eager=True,  # for a few prompts, compiling takes longer than it saves
    )
    load_seconds = time.perf_counter() - start
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    outputs = engine.generate(job["prompts"], sampling, use_tqdm=False)
    config = engine.llm_engine.vllm_config
    answer = {
        "architecture": config.model_config.architecture,
        # group-aware: blocks times block size is wrong for hybrid models
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
        "completions": [output.outputs[0].text for output in outputs],
        "load_seconds": round(load_seconds, 1),
    }
    connection.send(answer)
