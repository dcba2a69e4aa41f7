"""
Runs vLLM, in the serve environment.

Importing vLLM takes as long as starting an engine. So it is imported once, by a process
that then forks for each engine (``vllm_worker.py --jobs``); none sees what another did.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.rows import ROOT

WORKER = Path(__file__).with_name("vllm_worker.py")
# Several times what the slowest engine takes on two busy cores.
ENGINE_TIMEOUT_SECONDS = 400
ENVIRONMENT = {
    # The memory of every KV cache, so that capacities can be compared: 1 GiB.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # Functions may be sent to the engine: it is ours, and on this machine.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # Processes of tensor and pipeline parallel need not import vLLM again either.
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


@dataclass(frozen=True)
class Served:
    """
    What one vLLM engine made of the prompts.

    :param tokens: ids generated greedily, one list per prompt
    :param token_logprobs: of these, nat, same shape
    :param logprobs: of each prompt token but the first, all prompts in one row, nat
        ``[num_tokens]``; empty with an adapter
    :param kv_cache_tokens: tokens that fit in its KV cache
    :param block_size: tokens per block of it
    :param architecture: class of the model in vLLM
    :param chunked_prefill: whether long prompts may be computed in pieces
    :param counters: vLLM's counters by name
    :param linears: quantization method of each linear layer in place of an attention;
        None unless the engine ran in the worker's own process
    :param repeated: ``tokens`` of the second time and ``cached_tokens`` of each prompt,
        if there was one
    :param versions: of vLLM and transformers
    """

    tokens: list[list[int]]
    token_logprobs: list[list[float]]
    logprobs: torch.Tensor
    kv_cache_tokens: int
    block_size: int
    architecture: str
    chunked_prefill: bool
    counters: dict[str, int]
    linears: dict[str, str] | None
    repeated: dict[str, list[Any]] | None
    versions: dict[str, str]

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> "Served":
        """Return the answer in a worker's result."""
        fields = {name: result[name] for name in cls.__dataclass_fields__}
        fields["logprobs"] = torch.tensor(sum(result["logprobs"], []))
        return cls(**fields)


class Worker:
    """
    The process that has imported vLLM, started when it is first needed.

    :param folder: for its log, and for what vLLM keeps between engines unless
        VLLM_CACHE_ROOT says otherwise
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, job: dict[str, Any], log: Path) -> dict[str, Any]:
        """
        Run one engine and return its result, or fail the test with the end of its log.

        :param job: see ``vllm_worker.py``
        :param log: file that gets what vLLM prints; job and result are beside it
        """
        job_path, result = log.with_suffix(".job.json"), log.with_suffix(".result.json")
        job_path.write_text(json.dumps(job), encoding="utf-8")
        pipe = self._started()
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        pipe.stdin.write(f"{job_path}\t{result}\t{log}\n".encode())
        group = pipe.stdout.readline()
        if not group:
            pytest.fail(f"no vLLM worker:\n{tail(self._log)}", pytrace=False)
        try:
            in_time, _, _ = select.select([pipe.stdout], [], [], ENGINE_TIMEOUT_SECONDS)
        finally:
            # After a timeout or Ctrl-C; and vLLM may have left processes otherwise.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)
            pipe.stdout.readline()  # the exit code: `result` says all there is
        if not in_time:
            pytest.fail(
                f"vLLM took more than {ENGINE_TIMEOUT_SECONDS} s:\n{tail(log)}",
                pytrace=False,
            )
        if not result.exists():
            pytest.fail(f"the vLLM worker died:\n{tail(log)}", pytrace=False)
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self._folder / "worker.log"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [serve_python(), str(WORKER), "--jobs"],
                    env=vllm_environment(self._folder / "vllm_cache"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,  # select() below must see all there is to read
                )
        return self._process


def vllm_environment(cache: Path) -> dict[str, str]:
    """
    Return the variables of a process that runs vLLM; this process's own win.

    It finds torchvision, which models that see images need, in a folder of its own:
    see ``requirements/torchvision_sitecustomize.py``.
    """
    torchvision = Path(serve_python()).parents[1] / "torchvision"
    paths = [os.environ.get("PYTHONPATH"), str(torchvision)]
    variables = ENVIRONMENT | {"VLLM_CACHE_ROOT": str(cache)} | os.environ
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def serve_python() -> str:
    """Return the interpreter of the serve environment, or fail with the remedy."""
    default = ROOT / ".venv" / "serve" / "bin" / "python"
    python = Path(os.environ.get("NBL_SERVE_PYTHON") or default)
    if not python.exists():
        pytest.fail(
            f"the serve environment has no interpreter {python}. Run: make env-serve, "
            "or set NBL_SERVE_PYTHON.",
            pytrace=False,
        )
    return str(python)


def tail(log: Path, num_lines: int = 40) -> str:
    """Return the end of a log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    # vLLM dumps its whole state into one line.
    return "\n".join(line[:500] for line in text.splitlines()[-num_lines:])
