# SPDX-License-Identifier: Apache-2.0
"""Kept scores are found for the same model and settings, and only then."""

from pathlib import Path

import pytest

from nbl_modifier.evaluation import Score, TaskScores
from nbl_modifier.evaluation.cache import ScoreCache, default_folder, fingerprint

SCORES = {"one": TaskScores("one", "acc", 0, 3, "hash", {"acc": Score(0.5, 0.1, True)})}
SETTINGS = {"model": "abc", "limit": 3}


def test_finds_what_it_kept(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "new", SETTINGS)
    assert cache.load("one", 0) is None
    cache.save("one", 0, SCORES)
    assert ScoreCache(tmp_path / "new", SETTINGS).load("one", 0) == SCORES


@pytest.mark.parametrize(
    ("settings", "task", "shots"),
    [
        (SETTINGS | {"model": "abd"}, "one", 0),
        (SETTINGS | {"limit": None}, "one", 0),
        (SETTINGS | {"versions": {"lm-eval": "0"}}, "one", 0),
        (SETTINGS, "two", 0),
        (SETTINGS, "one", 5),
    ],
)
def test_anything_else_is_not_found(
    tmp_path: Path, settings: dict[str, object], task: str, shots: int
) -> None:
    ScoreCache(tmp_path, SETTINGS).save("one", 0, SCORES)
    assert ScoreCache(tmp_path, settings).load(task, shots) is None


def test_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, SETTINGS)
    cache.save("one", 0, SCORES)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])
    assert cache.load("one", 0) is None


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
    def write(name: str, weights: bytes, other: str = "card.md") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / other).write_text("x")
        return folder

    first = fingerprint(write("first", b"abc"))
    assert fingerprint(write("copy", b"abc", other="README.md")) == first
    assert fingerprint(write("changed", b"abd")) != first
    assert fingerprint(write("tokenizer", b"abc", other="tokenizer.json")) != first


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        fingerprint(tmp_path)


def test_folder_is_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NBL_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "evaluation"
    monkeypatch.delenv("NBL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "nbl_modifier" / "evaluation"
