# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine, some lm-eval tasks: the process that ``nbl evaluate`` starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbl_modifier.worker import Connection


def main(job: dict[str, Any], connection: Connection) -> None:
    """
    Answer the scores by task.

    :param job: model, tasks, limit, max_model_len
    :param connection: to answer by
    """
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.platforms import current_platform

    from nbl_modifier.evaluation import load_tasks
    from nbl_modifier.evaluation.harness import adds_bos, run_tasks

    from .sources import load_tokenizer

    if current_platform.is_cpu():
        # 1 GiB of KV cache, and no core claimed that another process may be using
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    tasks = load_tasks(job["tasks"])
    lm = VLLM(
        pretrained=job["model"],
        max_model_len=job["max_model_len"],
        add_bos_token=adds_bos(load_tokenizer(job["model"])),
        # on a CPU, compiling takes longer than it saves
        enforce_eager=current_platform.is_cpu(),
    )
    scores = run_tasks(lm, tasks, job["limit"])
    # Here, not at the interpreter's exit: vLLM's watching thread takes an engine that
    # ends there for one that failed, and may abort this process.
    lm.model.llm_engine.engine_core.shutdown()
    connection.send(scores)
