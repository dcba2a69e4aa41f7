"""
One vLLM engine, one job: the process that the tests and benchmarks/recipes.py start in
the serve environment.

    python vllm_worker.py JOB.json RESULT.json
    python vllm_worker.py --jobs    # any number of jobs, see jobs()

The job holds

- ``model``: checkpoint directory
- ``engine``: further arguments of ``vllm.LLM``
- ``prompts``: token ids, one list per prompt; ``max_tokens``: how many to generate
- ``in_process``: run the engine in this process, so that its modules can be looked at

and, if wanted,

- ``timed_runs``: how often to generate them once more, for the clock alone
- ``repeat``: generate them once more, as a client does that wants tokens only
- ``sleep``: level of vLLM's sleep mode to go through before that; 0: none
- ``lora``: directory of a LoRA adapter that every prompt is run with
- ``measure_init``: build the model and measure the memory that it takes, nothing else
- ``sabotage``: leave out one step of the plugin, to prove that a test would notice;
  see :func:`sabotage`
- ``environment``: variables on top of this process's

The result is what :func:`serve` returns, or ``error`` with the exception's text.
"""

import json
import os
import sys
import time
from importlib.metadata import (
    PackageNotFoundError,
    packages_distributions,
    version,
)
from pathlib import Path
from typing import Any

OPTIONAL: dict[str, Any] = {
    "timed_runs": 0,
    "repeat": False,
    "sleep": 0,
    "lora": None,
    "measure_init": False,
    "sabotage": None,
    "environment": {},
}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """
    Return what one engine did with ``job``, both as described above.

    Exits if the plugin is not installed: vLLM would refuse the checkpoint, rightly.
    """
    job = OPTIONAL | job
    os.environ.update(job["environment"])
    try:
        version("nbl-modifier")
    except PackageNotFoundError:
        sys.exit(f"{sys.executable} has no nbl-modifier. Run: make env-serve")
    if job["in_process"]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if job["sabotage"] is not None:
        sabotage(job["sabotage"])
    try:
        return measure_init(job) if job["measure_init"] else serve(job)
    except Exception as err:  # noqa: BLE001  # whatever vLLM raises is the answer
        return {"error": f"{type(err).__name__}: {err}"}


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """
    Load the model and run the prompts greedily, each to its full length.

    :return: ``tokens``, generated ids per prompt, and their ``token_logprobs``;
        ``logprobs``, of each prompt token but the first given those before it (not with
        ``lora``); ``kv_cache_tokens`` that fit in the KV
        cache, in blocks of ``block_size``; ``tokens_per_second`` generated in each
        timed run; ``repeated``, the ``tokens`` of the second time and the
        ``cached_tokens`` of each prompt that came from the prefix cache; ``counters``,
        vLLM's own, by name; ``linears``, the quantization method of each linear layer
        in place of an attention (``in_process`` only); ``architecture``,
        ``chunked_prefill``, ``versions``, ``load_seconds``, and None for ``error``
    """
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(model=job["model"], **job["engine"])
    load_seconds = time.perf_counter() - start
    chosen = {"temperature": 0.0, "max_tokens": job["max_tokens"], "ignore_eos": True}
    greedy = SamplingParams(**chosen)
    # That of the token itself, no alternatives. Those of prompts need the head on other
    # positions than the last, for which vLLM's CPU kernels have no adapter. Not set on
    # a clone: it is when they are made that they decide not to read the prefix cache,
    # which has no logprobs for a beginning that prompts share.
    scored = SamplingParams(
        **chosen, logprobs=0, prompt_logprobs=None if job["lora"] else 0
    )
    outputs = generate(engine, job, scored)
    tokens_per_second = [timed(engine, job, greedy) for _ in range(job["timed_runs"])]
    repeated = None
    if job["sleep"]:
        engine.sleep(level=job["sleep"])
        engine.wake_up()
        if job["sleep"] > 1:  # which forgets the weights
            engine.collective_rpc("reload_weights")
    if job["repeat"]:
        again = generate(engine, job, greedy)
        repeated = {
            "tokens": [list(output.outputs[0].token_ids) for output in again],
            "cached_tokens": [output.num_cached_tokens for output in again],
        }
    config = engine.llm_engine.vllm_config
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "token_logprobs": [
            of_each(output.outputs[0].token_ids, output.outputs[0].logprobs)
            for output in outputs
        ],
        "logprobs": [
            of_each(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
            for output in outputs
            if output.prompt_logprobs is not None
        ],
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
        "block_size": config.cache_config.block_size,
        "tokens_per_second": tokens_per_second,
        "repeated": repeated,
        "counters": counters(engine),
        "architecture": config.model_config.architecture,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "linears": engine.apply_model(linears)[0] if job["in_process"] else None,
        "versions": versions(),
        "load_seconds": round(load_seconds, 1),
        "error": None,
    }


def versions() -> dict[str, str]:
    """Return those of vLLM, whichever build is installed, and of transformers."""
    vllm = packages_distributions()["vllm"][0]
    return {name: version(name) for name in (vllm, "transformers")}


def generate(engine: Any, job: dict[str, Any], sampling: Any) -> list[Any]:
    """Return vLLM's outputs for the prompts, with the adapter if there is one."""
    from vllm.lora.request import LoRARequest

    return engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        sampling,
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, job["lora"]) if job["lora"] else None,
    )


def of_each(tokens: list[int], logprobs: Any) -> list[float]:
    """Return the log-probability of each token from vLLM's tables."""
    return [table[token].logprob for token, table in zip(tokens, logprobs, strict=True)]


def timed(engine: Any, job: dict[str, Any], sampling: Any) -> float:
    """Return the tokens generated per second, all prompts at once, prefill included."""
    start = time.perf_counter()
    generate(engine, job, sampling)
    seconds = time.perf_counter() - start
    return float(len(job["prompts"]) * job["max_tokens"] / seconds)


def counters(engine: Any) -> dict[str, int]:
    """Return vLLM's counters; none of them unless ``disable_log_stats`` is false."""
    if not engine.llm_engine.log_stats:
        return {}
    return {
        metric.name: metric.value
        for metric in engine.get_metrics()
        if type(metric).__name__ == "Counter"
    }


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


def measure_init(job: dict[str, Any]) -> dict[str, Any]:
    """
    Build the model without reading weights, and count every byte that torch allocates.

    :return: ``peak_bytes`` held at any moment, ``bytes`` held in the end, and
        ``parameter_bytes`` of the model
    """
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    build = base_loader.initialize_model
    measured: dict[str, Any] = {"error": None}

    def build_and_measure(*args: Any, **kwargs: Any) -> Any:
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            model = build(*args, **kwargs)
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        held = peak = 0
        for _, num_bytes in changes:
            held += num_bytes
            peak = max(peak, held)
        measured.update(
            peak_bytes=peak,
            bytes=held,
            parameter_bytes=sum(each.nbytes for each in model.parameters()),
        )
        return model

    base_loader.initialize_model = build_and_measure
    LLM(model=job["model"], load_format="dummy", **job["engine"])
    return measured


def sabotage(step: str) -> None:
    """
    Leave out one step of the plugin.

    :param step: ``keep_kv_cache`` leaves replaced attention in vLLM's list of layers
        that own a KV cache; ``build_attention`` lets all attention be built first
    """
    from nbl_modifier.vllm_plugin import exchange, model

    if step == "keep_kv_cache":
        exchange.forget = lambda replaced, vllm_config: None
    elif step == "build_attention":
        left_out = exchange.left_out
        model.left_out = lambda attribute, names, vllm_config: left_out(
            attribute, set(), vllm_config
        )
    else:
        raise AssertionError(step)


def jobs() -> None:
    """
    Run jobs as they come, each in a process of its own that need not import vLLM again.

    A line ``JOB.json RESULT.json LOG`` on standard input starts one and is answered by
    its process id, which is also that of its process group, and, when it has ended, by
    its exit code.
    """
    # Some releases of vLLM log to standard output while they are imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker
    from vllm import LLM

    del vllm, LLM  # imported for the processes to come
    for line in iter(sys.stdin.readline, ""):
        job_path, result_path, log = map(Path, line.rstrip("\n").split("\t"))
        child = os.fork()
        if child == 0:
            os.setsid()
            with log.open("w") as output, open(os.devnull) as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            run(job_path, result_path)
            return
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def run(job_path: Path, result_path: Path) -> None:
    """Run one job and write its result, both JSON files."""
    answer = main(json.loads(job_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--jobs"]:
        jobs()
    else:
        run(*map(Path, sys.argv[1:]))
