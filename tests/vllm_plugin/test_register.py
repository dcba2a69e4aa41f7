"""
What the plugin promises before vLLM is there; with vLLM see ``integration_tests/``.
"""

import subprocess
import sys

import pytest

from nbl_modifier.vllm_plugin import register


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
