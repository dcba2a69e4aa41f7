"""
Which part of nbl_modifier may import what. The table below is the contract.

Imports are read from the source, those inside functions and under TYPE_CHECKING
included, so the check needs none of the packages and sees code that tests do not reach.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nbl_modifier

PACKAGE = Path(__file__).parents[1] / "nbl_modifier"


@dataclass(frozen=True)
class Layer:
    """
    What the modules of one layer may import besides the standard library.

    :param ours: layers it may use
    :param packages: third-party packages it may import anywhere
    :param lazy: third-party packages it may import inside functions only
    """

    ours: str = ""
    packages: str = ""
    lazy: str = ""


# Top to bottom. A layer is a module of nbl_modifier or a folder of them; within a
# folder its files may import each other. Editing a row is a design decision.
LAYERS = {
    "cli": Layer(
        ours="llmcompressor_plugin benchmark evaluation report records numerics hf"
        " architectures criteria worker",
        lazy="llmcompressor huggingface_hub pydantic torch transformers datasets loguru"
        " yaml vllm lm_eval safetensors",
    ),
    # Where NBLModifier and calibration texts were in 0.1.
    "modifier": Layer(ours="llmcompressor_plugin"),
    "data": Layer(ours="evaluation"),
    "llmcompressor_plugin": Layer(
        ours="search calibration replacement layer_statistics report records numerics"
        " hf architectures criteria kv_cache",
        packages="llmcompressor compressed_tensors pydantic loguru torch transformers"
        " yaml",
    ),
    "search": Layer(
        ours="calibration replacement layer_statistics evaluation records numerics hf"
        " architectures criteria kv_cache",
        packages="compressed_tensors loguru torch transformers",
    ),
    "calibration": Layer(
        ours="replacement layer_statistics numerics hf architectures criteria",
        packages="loguru torch tqdm transformers",
    ),
    "replacement": Layer(
        ours="numerics hf architectures",
        packages="compressed_tensors loguru torch transformers",
    ),
    "layer_statistics": Layer(
        ours="records numerics", packages="loguru safetensors torch transformers"
    ),
    "evaluation": Layer(
        ours="records numerics hf",
        packages="torch",
        lazy="transformers datasets lm_eval tqdm",
    ),
    "benchmark": Layer(
        ours="records hf architectures kv_cache worker",
        packages="torch safetensors",
        lazy="transformers vllm",
    ),
    "report": Layer(
        ours="records criteria kv_cache", packages="jinja2", lazy="matplotlib"
    ),
    "vllm_plugin": Layer(ours="hf architectures", packages="vllm torch transformers"),
    "records": Layer(packages="pydantic"),
    "hf": Layer(
        ours="architectures", packages="torch transformers safetensors", lazy="peft"
    ),
    "numerics": Layer(packages="torch", lazy="scipy loguru"),
    "architectures": Layer(),
    "criteria": Layer(),
    "kv_cache": Layer(),
    "worker": Layer(),
    # The facade names the modifier for type checkers; it must not run that import.
    "__init__": Layer(ours="llmcompressor_plugin"),
}


@dataclass(frozen=True)
class Import:
    """
    One imported name.

    :param module: dotted name of the importing module
    :param target: dotted name of the imported module, for ours down to the file
    :param where: file and line, for messages
    :param in_function: whether it runs only when a function is called
    :param type_only: whether it stands under ``if TYPE_CHECKING`` and never runs
    """

    module: str
    target: str
    where: str
    in_function: bool
    type_only: bool


def module_name(path: Path) -> str:
    """Return the dotted name of ``path``, the package's own for an ``__init__.py``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> str:
    """Return the row of ``LAYERS`` that ``nbl_modifier.<row>...`` belongs to."""
    return (module.split(".") + ["__init__"])[1]


def imports_of(module: str) -> Iterator[Import]:
    """Yield every import statement of ``module``, relative ones resolved."""
    path = FILES[module]
    folder = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, in_function: bool, type_only: bool) -> Iterator[Import]:
        for target in imported_modules(node, folder):
            where = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
            yield Import(module, target, where, in_function, type_only)
        guarded = (
            node.body
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            else []
        )
        is_function = isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(
                child, in_function or is_function, type_only or child in guarded
            )

    yield from visit(ast.parse(path.read_text("utf-8")), False, False)


def imported_modules(node: ast.AST, folder: str) -> list[str]:
    """Return the modules that ``node`` imports; ``folder`` resolves relative names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        parents = folder.split(".")
        parents = parents[: len(parents) - (node.level - 1)]
        source = ".".join([*parents, source] if source else parents)
    if source.partition(".")[0] != PACKAGE.name:
        return [source]
    # "from . import psd" imports a module, "from .psd import symmetrize" a name of one,
    # and a public name of the facade stands for the module that defines it.
    names = [f"{source}.{alias.name}" for alias in node.names]
    public = {
        f"{PACKAGE.name}.{name}": f"{PACKAGE.name}{module}"
        for name, module in nbl_modifier._MODULES.items()
    }
    return [public.get(name, name if name in FILES else source) for name in names]


def is_allowed(imported: Import) -> bool:
    """Return whether the table lets ``imported.module`` import its target."""
    name = layer_of(imported.module)
    layer = LAYERS[name]
    package = imported.target.partition(".")[0]
    late = imported.in_function or imported.type_only
    if package != PACKAGE.name:
        return (
            package in sys.stdlib_module_names
            or package in layer.packages.split()
            or (package in layer.lazy.split() and late)
        )
    target = layer_of(imported.target)
    if target in ("__init__", name):
        return True
    if name == "__init__" and not imported.type_only:
        return False
    if name == "cli" and not late:
        return False  # `nbl --help` answers without loading the rest
    return target in layer.ours.split()


@pytest.mark.parametrize("module", FILES)
def test_module_imports_only_what_its_layer_allows(module: str) -> None:
    name = layer_of(module)
    assert name in LAYERS, (
        f"{module} belongs to no layer. Add a row {name!r} to LAYERS in {__file__}, "
        f"at the height its imports allow."
    )
    layer = LAYERS[name]
    wrong = [
        f"{imported.where} imports {imported.target}"
        for imported in imports_of(module)
        if not is_allowed(imported)
    ]
    assert not wrong, (
        f"not allowed in layer {name!r}, which may use layers [{layer.ours}], packages "
        f"[{layer.packages}], and inside functions [{layer.lazy}]:\n" + "\n".join(wrong)
    )


def test_layers_point_down() -> None:
    """The table itself is free of cycles and names only layers that it has."""
    graph = {
        name: set(layer.ours.split())
        for name, layer in LAYERS.items()
        if name != "__init__"
    }
    assert set().union(*graph.values()) <= graph.keys()
    TopologicalSorter(graph).prepare()


def test_modules_have_no_import_cycle() -> None:
    """No two files need each other, not even inside functions."""
    graph = {
        module: {each.target for each in imports_of(module) if not each.type_only}
        for module in FILES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        pytest.fail(f"import cycle: {' <- '.join(err.args[1])}")


def run_python(code: str, *, without: tuple[str, ...] = ()) -> str:
    """Return what ``code`` prints in a new interpreter, with ``without`` blocked."""
    blocked = f"import sys\nfor name in {without!r}: sys.modules[name] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["nbl_modifier", "nbl_modifier.cli"])
def test_import_loads_the_standard_library_only(module: str) -> None:
    """vLLM imports the package in each worker, and ``nbl --help`` answers at once."""
    if module not in FILES:
        pytest.skip(f"{module} does not exist yet")
    loaded = run_python(
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    assert loaded == PACKAGE.name


@pytest.mark.parametrize("module", ["nbl_modifier.vllm_plugin", "nbl_modifier.hf"])
def test_serving_side_imports_without_optional_packages(module: str) -> None:
    """The entry point loads where llm-compressor is missing, and before vLLM does."""
    if module not in FILES:
        pytest.skip(f"{module} does not exist yet")
    without = ("llmcompressor", "vllm", "scipy", "matplotlib", "datasets", "loguru")
    run_python(f"import {module}", without=(*without, "pydantic", "jinja2"))


def test_missing_llmcompressor_names_the_remedy() -> None:
    message = run_python(
        "try:\n"
        "    from nbl_modifier import NBLModifier\n"
        "except ImportError as err:\n"
        "    print(err)",
        without=("llmcompressor",),
    )
    assert 'pip install "nbl-modifier[compress]"' in message
