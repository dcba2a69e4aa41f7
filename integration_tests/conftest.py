"""Checkpoints and engines, each made once per session however many tests use it."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before transformers is imported: the bundled model is used, never the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from integration_tests import materials
from integration_tests.harness import Served, Worker, tail
from integration_tests.results import Recorder
from integration_tests.rows import DEMO_MODEL, Row


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--results``, ``--part`` and ``--later``."""
    parser.addoption(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="write the outcome of every cell of the support table that was run",
    )
    parser.addoption(
        "--part",
        default="1/1",
        metavar="I/N",
        help="run the I-th of N parts of the tests, for N processes side by side",
    )
    parser.addoption(
        "--later",
        metavar="NAME",
        help="what is run goes beside the last full run's results, under this name",
    )
    parser.addoption(
        "--materials",
        type=Path,
        metavar="FOLDER",
        help="write models and checkpoints there, and use those that are there already",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect results if they are wanted."""
    path = config.getoption("--results")
    if path is not None:
        part, later = config.getoption("--part"), config.getoption("--later")
        name = f"later_{later}" if later else f"part_{part.replace('/', '_of_')}"
        config.pluginmanager.register(Recorder(path / f"{name}.json"))


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """
    Keep this process's part of the tests, if there are others.

    Tests of one model stay together, since what they share is made once; the largest
    groups are dealt out first, each to the process that has the least so far. Where
    pytest-xdist deals them out (``--dist loadgroup``), tests of one checkpoint stay
    together, and those of one file that are of none.
    """
    together: dict[tuple[str, ...], int] = {}
    for item in items:
        key = _shared(item)
        number = together.setdefault(key, len(together))
        item.add_marker(pytest.mark.xdist_group(str(number)))
    part, of = map(int, config.getoption("--part").split("/"))
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
        model = row.model if isinstance(row, Row) else DEMO_MODEL
        groups.setdefault(model, []).append(item)
    parts: list[list[pytest.Item]] = [[] for _ in range(of)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    mine = set(parts[part - 1])
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = [item for item in items if item in mine]


def _shared(item: pytest.Item) -> tuple[str, ...]:
    """Return what a test has in common with those it should share a process with."""
    row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    if isinstance(row, Row):
        return (row.model, str(row.recipe))
    return (str(item.path),)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for models, checkpoints, logs and vLLM's cache."""
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
def worker(workplace: Path) -> Iterator[Worker]:
    """Return what runs vLLM."""
    worker = Worker(workplace)
    yield worker
    worker.stop()


class Materials:
    """
    Models, checkpoints and what goes with them, each written once.

    :param workplace: where to; what another session has written there is used
    """

    def __init__(self, workplace: Path) -> None:
        self._workplace = workplace
        self._made: dict[tuple[str, ...], Path] = {}

    def model(self, name: str) -> Path:
        """Return where a row's model is."""
        return self._once(
            lambda directory: materials.save_model(name, directory), "model", name
        )

    def checkpoint(self, recipe: str | None, model: str = DEMO_MODEL) -> Path:
        """Return a row's model, compressed by a recipe (YAML), or as it is."""
        if recipe is None:
            return self.model(model)
        source = self.model(model)
        return self._once(
            lambda directory: materials.compress(model, source, recipe, directory),
            "checkpoint",
            model,
            recipe,
        )

    def adapter(self, checkpoint: Path) -> Path:
        """Return a LoRA adapter for a checkpoint."""
        return self._once(
            lambda directory: materials.save_adapter(checkpoint, directory),
            "adapter",
            str(checkpoint),
        )

    def merged(self, checkpoint: Path) -> Path:
        """Return a checkpoint with that adapter merged into it."""
        adapter = self.adapter(checkpoint)
        return self._once(
            lambda directory: materials.save_merged(checkpoint, adapter, directory),
            "merged",
            str(checkpoint),
        )

    def draft(self, checkpoint: Path) -> Path:
        """Return an EAGLE-3 head for a checkpoint."""
        return self._once(
            lambda directory: materials.save_draft(checkpoint, directory),
            "draft",
            str(checkpoint),
        )

    def _once(self, write: Callable[[Path], Path | None], *key: str) -> Path:
        if key not in self._made:
            digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:12]
            directory = self._workplace / f"{key[0]}-{digest}"
            if directory.exists():
                self._made[key] = directory
            else:
                self._made[key] = write(directory) or directory
        return self._made[key]


@pytest.fixture(scope="session")
def made(
    workplace: Path, pageable_cache: None, request: pytest.FixtureRequest
) -> Materials:
    """Return what makes models, checkpoints and adapters."""
    return Materials(request.config.getoption("--materials") or workplace)


@pytest.fixture(scope="session")
def checkpoint(made: Materials) -> Callable[..., Path]:
    """Return a function from a recipe (YAML) to the model compressed by it."""
    return made.checkpoint


@pytest.fixture(scope="session")
def raw(worker: Worker, made: Materials, workplace: Path) -> Callable[..., Any]:
    """
    Return a function that runs a checkpoint in vLLM and returns the worker's result,
    the same one for the same arguments.

    It takes the checkpoint, the name of its model, and the job's fields but those that
    follow from these two.
    """
    results: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(
        directory: Path, model: str = DEMO_MODEL, **fields: Any
    ) -> tuple[dict[str, Any], Path]:
        key = repr((directory, sorted(fields.items())))
        if key not in results:
            engine = materials.engine_defaults(model) | fields.pop("engine", {})
            job = {
                "model": str(directory),
                "engine": engine,
                "prompts": materials.prompts(model),
                "max_tokens": materials.max_tokens(model),
                "in_process": True,
            }
            log = workplace / f"engine-{len(results)}.log"
            results[key] = worker.run(job | fields, log), log
        return results[key]

    return run


@pytest.fixture(scope="session")
def engine(raw: Callable[..., Any]) -> Callable[..., Served]:
    """Return a function that runs a checkpoint as ``raw`` does and wants an answer."""

    def run(directory: Path, model: str = DEMO_MODEL, **fields: Any) -> Served:
        result, log = raw(directory, model, **fields)
        if result["error"] is not None:
            pytest.fail(f"{result['error']}\n{tail(log)}", pytrace=False)
        return Served.from_result(result)

    return run


@pytest.fixture(scope="session")
def job(made: Materials) -> Callable[[Row, Path], dict[str, Any]]:
    """Return a function from a row and a checkpoint to the fields of its job."""

    def fields(row: Row, directory: Path) -> dict[str, Any]:
        engine = {"dtype": row.dtype} | row.engine
        if "speculative_config" in engine:
            speculative = dict(engine["speculative_config"])
            if speculative["method"] == "eagle3":
                speculative.setdefault("model", str(made.draft(directory)))
            engine |= {"speculative_config": speculative, "disable_log_stats": False}
        if row.lora:
            engine |= {"enable_lora": True, "max_lora_rank": materials.LORA_RANK}
        return {
            "engine": engine,
            "in_process": row.in_process,
            "repeat": row.repeat,
            "lora": str(made.adapter(directory)) if row.lora else None,
        }

    return fields


@pytest.fixture(scope="session")
def served(
    made: Materials,
    engine: Callable[..., Served],
    job: Callable[[Row, Path], dict[str, Any]],
) -> Callable[[Row], Served]:
    """Return a function that runs a row's checkpoint in vLLM."""

    def run(row: Row) -> Served:
        directory = made.checkpoint(row.recipe_text, row.model)
        return engine(directory, row.model, **job(row, directory))

    return run


@pytest.fixture(scope="session")
def base(made: Materials, engine: Callable[..., Served]) -> Callable[[Row], Served]:
    """
    Return a function that runs a row's model itself in vLLM, in the row's dtype.

    Eagerly and in one process also where a row is not: on the CPU that does not change
    the memory for the KV cache, VLLM_CPU_KVCACHE_SPACE for each process. Caching of
    prefixes, as the row has it, does where layers are recurrent.
    """

    def run(row: Row) -> Served:
        same = row.engine.keys() & {"enable_prefix_caching", "language_model_only"}
        options = {"dtype": row.dtype} | {name: row.engine[name] for name in same}
        return engine(made.model(row.model), row.model, engine=options)

    return run


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
        # Behind the @ is the group that pytest-xdist adds.
        name = report.nodeid.partition("::")[2].partition("@")[0]
        terminalreporter.write_line(f"{name}: {figures}")
