# SPDX-License-Identifier: Apache-2.0
"""Versions come from metadata, nothing is imported for them."""

import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib import metadata

import pytest

from nbl_modifier.records.provenance import collect_versions, utc_timestamp


def test_versions_are_those_installed() -> None:
    versions = collect_versions()
    assert versions["python"] == platform.python_version()
    for name in ("torch", "transformers", "llmcompressor", "compressed-tensors"):
        assert versions[name] == metadata.version(name)


def test_missing_package_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "llmcompressor":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    versions = collect_versions()
    assert "llmcompressor" not in versions
    assert "torch" in versions


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, nbl_modifier.records.provenance as p; p.collect_versions();"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_timestamp_is_now_in_utc() -> None:
    stamp = datetime.fromisoformat(utc_timestamp())
    assert stamp.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - stamp) < timedelta(seconds=5)
