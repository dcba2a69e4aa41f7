# SPDX-License-Identifier: Apache-2.0
"""Scores of base models, kept so that each is evaluated once. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_modifier.records.files import write_atomically

from .scores import TaskScores

_FORMAT_VERSION = 1


def default_folder() -> Path:
    """Return ``NBL_CACHE``, or a folder in the user's cache, for ``ScoreCache``."""
    named = os.environ.get("NBL_CACHE")
    if named:
        return Path(named).expanduser() / "evaluation"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root).expanduser() / "nbl_modifier" / "evaluation"


def fingerprint(directory: str | os.PathLike[str]) -> str:
    """
    Return a hash of a checkpoint's files that decide what the model computes.

    :param directory: config, tokenizer and weights
    :raises FileNotFoundError: if there are no weights
    """
    folder = Path(directory)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights:
        raise FileNotFoundError(f"model {directory}: the directory holds no weights.")
    described = [
        path
        for pattern in ("config.json", "tokenizer*", "*.model", "vocab*", "merges*")
        for path in folder.glob(pattern)
    ]
    digest = hashlib.sha256()
    for path in sorted({*weights, *described}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class ScoreCache:
    """
    Scores in a folder, one JSON file for each model, task and set of versions.

    :param folder: made when something is saved
    :param settings: all that decides scores but the task: the model's fingerprint,
        backend, limit, versions
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._settings = dict(settings)

    def load(self, task: str, num_fewshot: int | None) -> dict[str, TaskScores] | None:
        """
        Return what ``save`` was given, or None.

        :param task: name the task was asked for by
        :param num_fewshot: shots asked for
        """
        try:
            text = self._path(task, num_fewshot).read_text(encoding="utf-8")
            fields = json.loads(text)["scores"]
            return {
                name: TaskScores.from_fields(entry) for name, entry in fields.items()
            }
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # damaged, or of another version
            return None

    def save(
        self, task: str, num_fewshot: int | None, scores: Mapping[str, TaskScores]
    ) -> None:
        """
        Keep scores.

        :param task: name the task was asked for by
        :param num_fewshot: shots asked for
        :param scores: what was listed for it
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": self._key(task, num_fewshot),
            "scores": {name: each.to_fields() for name, each in scores.items()},
        }
        write_atomically(self._path(task, num_fewshot), json.dumps(content) + "\n")

    def _key(self, task: str, num_fewshot: int | None) -> dict[str, Any]:
        return {
            "format": _FORMAT_VERSION,
            "task": task,
            "num_fewshot": num_fewshot,
            **self._settings,
        }

    def _path(self, task: str, num_fewshot: int | None) -> Path:
        key = json.dumps(self._key(task, num_fewshot), sort_keys=True)
        name = Path(task).stem
        return self._folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()}.json"
