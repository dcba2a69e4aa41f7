# SPDX-License-Identifier: Apache-2.0
"""Directories that are replaced as a whole. Kills are in test_checkpoint.py."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path

import pytest

from nbl_modifier.hf import directories
from nbl_modifier.hf.directories import is_interrupted, recover, replaced

Tree = dict[str, str]
INSIDE = pytest.mark.parametrize("inside", [False, True], ids=["exchange", "inside"])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return where a checkpoint is to lie."""
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the exchange away from the system where a test is about its absence."""
    if "inside" in request.fixturenames and request.getfixturevalue("inside"):
        monkeypatch.setattr(directories.ctypes, "CDLL", lambda *_, **__: object())


def write(folder: Path, tree: Tree) -> None:
    for name, text in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(folder: Path) -> Tree:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_stale(path: Path, new: Collection[str]) -> bool:
    return path.name.startswith(("config", "model"))


def replace(target: Path, tree: Tree) -> None:
    with replaced(target, is_stale) as folder:
        write(folder, tree)


OLD = {"config.json": "old", "model-1": "old", "model-2": "old"}
KEPT = {"notes.txt": "precious", "mine/deep/notes": "precious", "README.md": "of old"}
NEW = {"config.json": "new", "model-1": "new", "README.md": "new", "extra/chat": "new"}


@INSIDE
def test_new_takes_the_place_of_old(target: Path, inside: bool) -> None:
    write(target, OLD | KEPT)
    (target / "link").symlink_to("notes.txt")
    replace(target, NEW)
    assert read(target) == KEPT | NEW | {"link": "precious"}
    assert (target / "link").is_symlink()
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@INSIDE
@pytest.mark.parametrize("exists", [False, True])
def test_where_there_is_nothing_yet(tmp_path: Path, inside: bool, exists: bool) -> None:
    target = tmp_path / "new" / "er"
    if exists:
        target.mkdir(parents=True)
    replace(target, NEW)
    assert read(tmp_path) == {f"new/er/{name}": text for name, text in NEW.items()}


@INSIDE
def test_failure_changes_nothing(target: Path, inside: bool) -> None:
    write(target, OLD | KEPT)

    def fail() -> None:
        with replaced(target, is_stale) as folder:
            write(folder, NEW)
            raise RuntimeError("why")

    with pytest.raises(RuntimeError, match="why"):
        fail()
    assert read(target.parent) == {f"out/{n}": text for n, text in (OLD | KEPT).items()}


@INSIDE
def test_permissions_are_kept(target: Path, inside: bool) -> None:
    write(target, OLD)
    target.chmod(0o2750)
    replace(target, NEW)
    assert stat.S_IMODE(target.stat().st_mode) == 0o2750


def test_what_appears_meanwhile_is_kept(target: Path) -> None:
    write(target, OLD)
    with replaced(target, is_stale) as folder:
        write(folder, NEW)
        write(target, {"log.txt": "line"})
    assert read(target) == NEW | {"log.txt": "line"}


@INSIDE
def test_what_others_left_is_cleared_away(target: Path, inside: bool) -> None:
    write(target, OLD | {".nbl-incomplete/config.json": "half"})
    write(target.parent / ".out.nbl-incomplete", {"config.json": "half"})
    replace(target, NEW)
    found = read(target)
    assert found == NEW
    assert not is_interrupted(target)


def test_mount_point(tmp_path: Path) -> None:
    """It cannot be exchanged, and neither moved into from beside it in one step."""
    target = tmp_path / "out"
    target.mkdir()
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.hf.test_directories import *\n"
        "target = Path(sys.argv[1])\n"
        "write(target, OLD | KEPT)\n"
        "replace(target, NEW)\n"
        "assert read(target) == KEPT | NEW, read(target)\n"
        "assert [path.name for path in target.parent.iterdir()] == ['out']\n"
        "print('replaced')\n"
    )
    shell = 'mount -t tmpfs none "$1" && exec "$2" -c "$3" "$1"'
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, "-", target, sys.executable, script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in run.stderr or "mount" in run.stderr.partition("Traceback")[0]:
        pytest.skip("mounting takes rights that are not given here")
    assert run.stdout == "replaced\n", run.stderr


# --- two at once ----------------------------------------------------------------------


@INSIDE
def test_one_of_two_wins_and_the_other_is_told(target: Path, inside: bool) -> None:
    write(target, OLD)
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with replaced(target, is_stale) as folder:
            write(folder, NEW)
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(60)
    with pytest.raises(BlockingIOError, match=r"out: another run is saving.*Choose"):
        replace(target, {"config.json": "of the other"})
    recover(target)  # leaves it alone
    leave.set()
    thread.join()
    assert read(target) == NEW
    replace(target, {"config.json": "later"})
    assert read(target)["config.json"] == "later"


def test_many_at_once_never_mix(target: Path) -> None:
    results: list[str] = []

    def save(name: str) -> None:
        for _ in range(20):
            try:
                replace(target, {"config.json": name, "model-1": name})
            except BlockingIOError:
                results.append("refused")
            else:
                results.append("saved")

    threads = [threading.Thread(target=save, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert "saved" in results
    found = read(target)
    assert found.keys() == {"config.json", "model-1"}
    assert len(set(found.values())) == 1
    assert [path.name for path in target.parent.iterdir()] == ["out"]


# --- interrupted ----------------------------------------------------------------------


def test_complete_directory_is_moved_up_by_the_next_run(target: Path) -> None:
    """What a kill leaves where directories cannot be exchanged."""
    write(target, {"model-1": "new", "model-2": "old", "notes.txt": "precious"})
    complete = target / ".nbl-complete"
    write(complete, {"config.json": "new", ".nbl-stale.json": '["model-2"]'})
    assert is_interrupted(target)
    recover(target)
    expected = {"config.json": "new", "model-1": "new", "notes.txt": "precious"}
    assert read(target) == expected
    recover(target)
    assert read(target) == expected


def test_incomplete_directory_is_not_moved_up(target: Path) -> None:
    write(target, OLD | {".nbl-incomplete/config.json": "half"})
    recover(target)
    assert read(target)["config.json"] == "old"


def test_nothing_to_recover(target: Path) -> None:
    recover(target)
    assert not target.exists()
