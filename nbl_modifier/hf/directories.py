"""
Directories that change as a whole: the old content or the new, at every moment.

Standard library only. Where the system can, the new directory is written beside the old
one and the two are exchanged in one step. Where it cannot (a mount point, a file system
or a system without the call, a parent directory that is not writable) the new one is
written inside the old one, which stays until the new one is complete; what was
interrupted after that is finished by the next call of :func:`recover`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

__all__ = ["is_interrupted", "recover", "replaced"]

# Without this file a directory does not load as a model.
_KEY_FILE = "config.json"
_INCOMPLETE, _COMPLETE, _LOCK = ".nbl-incomplete", ".nbl-complete", ".nbl-lock"
_STALE = ".nbl-stale.json"
_HIDDEN = frozenset({_INCOMPLETE, _COMPLETE, _LOCK})
# linux/fs.h and fcntl.h
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextlib.contextmanager
def replaced(
    target: Path, is_stale: Callable[[Path, Collection[str]], bool]
) -> Iterator[Path]:
    """
    Yield an empty directory that takes the place of ``target`` when the block ends.

    Its ``config.json`` should be written last: a directory without one does not load.
    If the block fails, ``target`` stays as it was. What is on disk when this returns
    survives a power failure.

    :param target: the directory, which need not exist
    :param is_stale: whether an entry of the old directory goes with it, by its path and
        the names in the new one; everything else is kept
    :raises BlockingIOError: if another process, or thread, is at it already
    :raises OSError: if it cannot be written
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if target.exists():
            _finish(target)
        beside = _can_be_moved(target)
        staging = _beside(target, _INCOMPLETE) if beside else target / _INCOMPLETE
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            _publish(staging, target, is_stale)
        finally:
            _remove(staging)


def recover(target: Path) -> None:
    """
    Finish what was interrupted when only the last step was missing.

    :param target: a directory, which need not exist
    :raises OSError: if it cannot be written
    """
    target = target.resolve()
    if (target / _COMPLETE).is_dir():
        # Somebody who holds the lock is at it.
        with contextlib.suppress(BlockingIOError), _locked(target):
            _finish(target)


def is_interrupted(target: Path) -> bool:
    """
    Return whether what lies in a directory without a ``config.json`` is a part of ours.

    :param target: an existing directory
    """
    return any((target / name).is_dir() for name in (_INCOMPLETE, _COMPLETE))


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}{suffix}")


def _can_be_moved(target: Path) -> bool:
    return os.access(target.parent, os.W_OK | os.X_OK) and not target.is_mount()


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    beside = _can_be_moved(target)
    path = _beside(target, _LOCK) if beside else target / _LOCK
    descriptor = _lock(path, target)
    try:
        yield
    finally:
        # while it is held: whoever waits for the file finds it gone, and makes another
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, target: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(descriptor)
            raise BlockingIOError(
                f"output directory {target}: another run is saving into it right now. "
                "Choose another directory, or save again when it has finished."
            ) from err
        except OSError as err:  # some network file systems have no locks
            warnings.warn(
                f"output directory {target}: cannot be locked ({err.strerror}). Let "
                "no other run save into it.",
                stacklevel=2,
            )
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # of one who has finished since it was opened


def _publish(
    staging: Path, target: Path, is_stale: Callable[[Path, Collection[str]], bool]
) -> None:
    new = {path.name for path in staging.iterdir()}
    old = sorted(target.iterdir()) if target.exists() else []
    old = [path for path in old if path.name not in _HIDDEN]
    stale = [path for path in old if is_stale(path, new)]
    kept = [path for path in old if path not in stale]
    for path in kept:
        if path.name in new and path.is_dir() and not (staging / path.name).is_dir():
            raise IsADirectoryError(
                f"output directory {target}: {path.name} is a directory, and the file "
                "of that name cannot take its place. Choose another directory, or "
                "remove it."
            )
    kept = [path for path in kept if path.name not in new]
    _flush_tree(staging)
    if staging.parent == target.parent:
        if not target.exists():
            staging.rename(target)
            _flush(target.parent)
            return
        shutil.copystat(target, staging)
        for path in kept:
            _link(path, staging / path.name)
        _flush(staging)
        if _exchange(staging, target):
            _flush(target.parent)
            _bring_along(staging, target, is_stale, new)
            return
        for path in kept:
            _remove(staging / path.name)
    _publish_inside(staging, target, [p.name for p in stale if p.name not in new])


def _bring_along(
    old: Path,
    target: Path,
    is_stale: Callable[[Path, Collection[str]], bool],
    new: Collection[str],
) -> None:
    """Move what came into the old directory while the two were being exchanged."""
    for path in old.iterdir():
        gone = path.name in _HIDDEN or is_stale(path, new)
        if not (gone or (target / path.name).exists()):
            path.rename(target / path.name)


def _publish_inside(staging: Path, target: Path, stale: list[str]) -> None:
    inside, complete = target / _INCOMPLETE, target / _COMPLETE
    if staging != inside:  # it looked as if the two could be exchanged
        _remove(inside)
        shutil.move(staging, inside)
    (inside / _STALE).write_text(json.dumps(stale), encoding="utf-8")
    _flush_tree(inside)
    inside.rename(complete)
    _flush(target)
    _finish(target)


def _finish(target: Path) -> None:
    """Move a complete directory up. Goes on wherever it was interrupted."""
    complete = target / _COMPLETE
    key = complete / _KEY_FILE
    if key.exists():
        # While files are exchanged the directory must not load: this goes first and
        # comes last.
        (target / _KEY_FILE).unlink(missing_ok=True)
        names = {path.name for path in complete.iterdir()} - {_STALE, _KEY_FILE}
        stale = json.loads((complete / _STALE).read_text(encoding="utf-8"))
        for name in stale:
            _remove(target / name)
        for name in sorted(names):
            if (target / name).is_dir():
                _remove(target / name)
            (complete / name).replace(target / name)
        _flush(target)
        key.replace(target / _KEY_FILE)
        _flush(target)
    _remove(complete)


def _exchange(one: Path, other: Path) -> bool:
    """
    Exchange two directories in one step.

    :return: whether that was possible, which file system, mounts and rights decide
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    failed: int = call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return failed == 0


def _link(source: Path, destination: Path) -> None:
    """Have a file, or all of a folder, in a second place."""

    def link(source: str, destination: str) -> str:
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError:  # a file system without, or somebody else's file
            shutil.copy2(source, destination, follow_symlinks=False)
        return destination

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, destination, symlinks=True, copy_function=link)
    else:
        link(str(source), str(destination))


def _remove(path: Path) -> None:
    """Remove whatever there is; from a directory what makes it load first."""
    if path.is_dir() and not path.is_symlink():
        (path / _KEY_FILE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _flush(Path(parent, name))
        _flush(Path(parent))


def _flush(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on disk."""
    if not path.is_dir() and (path.is_symlink() or not path.is_file()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno != errno.EINVAL:  # nothing to flush on this file system
            raise
    finally:
        os.close(descriptor)
