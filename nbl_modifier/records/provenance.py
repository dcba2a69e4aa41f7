# SPDX-License-Identifier: Apache-2.0
"""Where and when a result was made. Standard library only."""

import platform
from datetime import UTC, datetime
from importlib import metadata

_DISTRIBUTIONS = {
    "nbl_modifier": "nbl-modifier",
    "torch": "torch",
    "transformers": "transformers",
    "llmcompressor": "llmcompressor",
    "compressed-tensors": "compressed-tensors",
    "lm-eval": "lm_eval",
    "vllm": "vllm",
}


def collect_versions() -> dict[str, str]:
    """
    Return the versions a result depends on, without importing any of the packages.

    A package that is not installed is left out.
    """
    versions = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return versions


def utc_timestamp() -> str:
    """Return the time now, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
