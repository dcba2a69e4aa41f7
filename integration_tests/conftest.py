"""Checkpoints and engines, each made once per session however many tests use it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before transformers is imported: the bundled model is used, never the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from integration_tests import harness
from integration_tests.harness import MODEL, Row, Served


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for checkpoints, logs and vLLM's cache."""
    return tmp_path_factory.mktemp("integration")


@pytest.fixture(scope="session")
def pageable_cache() -> Iterator[None]:
    """
    Let AWQ run on machines without an accelerator.

    It pins the activations it caches, which torch refuses there (llmcompressor
    0.14.0.1, modifiers/transform/awq/base.py, ``_setup_activation_cache_hooks``).
    """
    from llmcompressor.pipelines.cache import IntermediatesCache

    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            patch.setattr(IntermediatesCache, "pin_memory", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session")
def checkpoint(workplace: Path, pageable_cache: None) -> Callable[[str], Path]:
    """Return a function from a recipe (YAML) to the demo model compressed by it."""
    made: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            directory = workplace / f"checkpoint-{len(made)}"
            harness.compress(recipe, directory)
            made[recipe] = directory
        return made[recipe]

    return make


@pytest.fixture(scope="session")
def engine(workplace: Path) -> Callable[..., Served]:
    """
    Return a function that runs a checkpoint in vLLM, with `harness.run_worker`'s
    arguments, and returns the same answer to the same arguments.
    """
    answers: dict[str, Served] = {}

    def run(directory: Path, **arguments: Any) -> Served:
        key = repr((directory, sorted(arguments.items())))
        if key not in answers:
            log = workplace / f"engine-{len(answers)}.log"
            result = harness.run_worker(directory, log, **arguments)
            if result["error"] is not None:
                pytest.fail(f"{result['error']}\n{harness.tail(log)}", pytrace=False)
            answers[key] = Served(
                tokens=result["tokens"],
                logprobs=torch.tensor(sum(result["logprobs"], [])),
                kv_cache_tokens=result["kv_cache_tokens"],
                block_size=result["block_size"],
                architecture=result["architecture"],
                linears=result["linears"],
            )
        return answers[key]

    return run


@pytest.fixture(scope="session")
def served(
    checkpoint: Callable[[str], Path], engine: Callable[..., Served]
) -> Callable[[Row], Served]:
    """Return a function that runs a row's checkpoint in vLLM."""

    def run(row: Row) -> Served:
        return engine(
            checkpoint(row.recipe_text),
            engine={"dtype": row.dtype} | row.engine,
            in_process=row.in_process,
        )

    return run


@pytest.fixture(scope="session")
def base(engine: Callable[..., Served]) -> Callable[[str], Served]:
    """
    Return a function that runs the demo model itself in vLLM, given the dtype.

    Eagerly and in the worker's process also where a row is not: on the CPU neither
    changes the memory for the KV cache, VLLM_CPU_KVCACHE_SPACE.
    """
    return lambda dtype: engine(MODEL, engine={"dtype": dtype})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests recorded, so that a log shows how close it was."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports(
        "failed"
    )
    measured = [report for report in reports if report.user_properties]
    if measured:
        terminalreporter.section("measured")
    for report in measured:
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {figures}")
