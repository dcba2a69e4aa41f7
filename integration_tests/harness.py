"""
What the integration tests share: rows, checkpoints, and the two ways to run a model.

transformers and llm-compressor run here, in the compress environment; vLLM runs in the
serve environment, one process per engine (``vllm_worker.py``).
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nbl_modifier.data import load_texts, pack
from nbl_modifier.hf import register

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "models" / "pycode-4m"
CONFIGS = Path(__file__).with_name("configs")
WORKER = Path(__file__).with_name("vllm_worker.py")

MAX_TOKENS = 32
SHORTEST_PROMPT, LONGEST_PROMPT, NUM_PROMPTS = 5, 130, 20
# Several times what the slowest engine takes on two busy cores.
ENGINE_TIMEOUT_SECONDS = 300
# In every engine unless a row says otherwise. Longest prompt and answer fit.
ENGINE_DEFAULTS = {"enforce_eager": True, "max_model_len": 512}

register()


@dataclass(frozen=True)
class Row:
    """
    One case, a file in ``configs/``.

    :param name: the file's name
    :param recipe: llm-compressor recipe, or the path of one in this repository
    :param linearized: layers that must come out linear, or how many
    :param dtype: as in vLLM and transformers
    :param expect: what must hold; its keys are read by the tests
    :param engine: arguments of ``vllm.LLM`` besides the defaults
    :param in_process: run the engine in the worker itself, which starts faster and lets
        the test look inside; otherwise in processes of its own, as in production
    :param slow: leave the row out of ``make test``
    """

    name: str
    recipe: str | dict[str, Any]
    linearized: int | list[int]
    dtype: str
    expect: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    in_process: bool = True
    slow: bool = False

    @property
    def recipe_text(self) -> str:
        """The recipe as YAML."""
        if isinstance(self.recipe, str):
            return (ROOT / self.recipe).read_text(encoding="utf-8")
        return yaml.safe_dump(self.recipe)

    @property
    def nbl_text(self) -> str:
        """The recipe without all that comes after NBL, as YAML."""
        return self._part(lambda name: name == "NBLModifier")

    @property
    def quantizer_text(self) -> str:
        """The recipe without NBL, as YAML."""
        return self._part(lambda name: name != "NBLModifier")

    def _part(self, belongs: Callable[[str], bool]) -> str:
        modifiers = yaml.safe_load(self.recipe_text)["default_stage"][
            "default_modifiers"
        ]
        part = {name: fields for name, fields in modifiers.items() if belongs(name)}
        return yaml.safe_dump(
            {"default_stage": {"default_modifiers": part}}, sort_keys=False
        )


def rows(expectation: str | None = None) -> list[Any]:
    """
    Return the rows as pytest parameters.

    :param expectation: only rows whose ``expect`` has this key
    """
    found = [
        Row(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(CONFIGS.glob("*.yaml"))
    ]
    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in found
        if expectation is None or expectation in row.expect
    ]


@cache
def prompts() -> list[list[int]]:
    """Return 20 beginnings of standard library modules, 5 to 130 tokens, BOS first."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = load_texts("stdlib", "heldout")[:NUM_PROMPTS]
    step = (LONGEST_PROMPT - SHORTEST_PROMPT) / (NUM_PROMPTS - 1)
    windows = [
        pack([text], tokenizer, round(SHORTEST_PROMPT + step * i), 1)["input_ids"][0]
        for i, text in enumerate(texts)
    ]
    assert len(windows) == NUM_PROMPTS
    assert all(window[0] == tokenizer.bos_token_id for window in windows)
    return windows


def compress(recipe: str, directory: Path) -> None:
    """
    Write the demo model, compressed by ``recipe``, to ``directory``.

    :param recipe: llm-compressor recipe as YAML
    """
    from llmcompressor import oneshot

    import nbl_modifier.modifier  # noqa: F401  # makes NBLModifier known to recipes

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # 64 tokens per dimension of the model's residual stream: quick, and well determined
    dataset = pack(load_texts("stdlib", "calibration"), tokenizer, 512, 16)
    torch.manual_seed(0)  # the data loader draws the order of the samples
    oneshot(
        model=str(MODEL),
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(dataset),
        max_seq_length=512,
        output_dir=str(directory),
    )


@dataclass(frozen=True)
class Served:
    """
    What one vLLM engine made of :func:`prompts`.

    :param tokens: ids generated greedily, ``MAX_TOKENS`` per prompt
    :param logprobs: of each prompt token but the first, all prompts in one row, nat
        ``[num_tokens]``
    :param kv_cache_tokens: tokens that fit in its KV cache
    :param block_size: tokens per block of it
    :param architecture: class of the model in vLLM
    :param linears: quantization method of each linear layer in place of an attention;
        None unless the engine ran in the worker's own process
    """

    tokens: list[list[int]]
    logprobs: torch.Tensor
    kv_cache_tokens: int
    block_size: int
    architecture: str
    linears: dict[str, str] | None


@cache
def transformers_tokens(directory: Path, dtype: str) -> list[list[int]]:
    """
    Return what transformers generates greedily, one prompt at a time.

    :param directory: checkpoint
    :param dtype: name of a torch dtype
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    return [generate(model, torch.tensor([prompt])) for prompt in prompts()]


@cache
def transformers_logprobs(directory: Path, dtype: str) -> torch.Tensor:
    """
    Return the prompts' log-probabilities in transformers, as in :class:`Served`.

    :param directory: checkpoint
    :param dtype: name of a torch dtype
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    return torch.cat([logprobs(model, torch.tensor([prompt])) for prompt in prompts()])


@torch.no_grad()
def generate(model: Any, input_ids: torch.Tensor) -> list[int]:
    """
    Return the greedy continuation, past any end of text.

    :param input_ids: ``[1, num_tokens]``
    """
    model.generation_config.eos_token_id = None
    output = model.generate(input_ids, do_sample=False, max_new_tokens=MAX_TOKENS)
    return output[0, input_ids.shape[1] :].tolist()


@torch.no_grad()
def logprobs(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """
    Return the log-probability of each token but the first.

    :param input_ids: ``[1, num_tokens]``
    :return: float32 ``[num_tokens - 1]``
    """
    logits = model(input_ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, input_ids[0, 1:, None])[:, 0]


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


def run_worker(
    directory: Path,
    log: Path,
    *,
    engine: dict[str, Any],
    in_process: bool = True,
    sabotage: str | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    Run the prompts in vLLM and return the worker's result.

    :param directory: checkpoint
    :param log: file that gets what vLLM prints; the job and result are beside it
    :param engine: arguments of ``vllm.LLM`` besides the defaults
    :param in_process: see :class:`Row`
    :param sabotage: see ``vllm_worker.py``
    :param environment: variables on top of this process's
    """
    job, result = log.with_suffix(".job.json"), log.with_suffix(".result.json")
    content = {
        "model": str(directory),
        "engine": ENGINE_DEFAULTS | engine,
        "prompts": prompts(),
        "max_tokens": MAX_TOKENS,
        "timed_runs": 0,
        "in_process": in_process,
        "sabotage": sabotage,
    }
    job.write_text(json.dumps(content), encoding="utf-8")
    defaults = {
        "VLLM_CACHE_ROOT": str(log.parent / "vllm_cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        # Functions may be sent to the engine: it is ours, and on this machine.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [serve_python(), str(WORKER), str(job), str(result)],
            env=defaults | os.environ | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a timeout ends vLLM's own processes too
        )
        try:
            process.wait(ENGINE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(
                f"vLLM took more than {ENGINE_TIMEOUT_SECONDS} s:\n{tail(log)}",
                pytrace=False,
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not result.exists():
        pytest.fail(f"the vLLM worker died:\n{tail(log)}", pytrace=False)
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return answer


def tail(log: Path, num_lines: int = 40) -> str:
    """Return the end of a log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-num_lines:])
