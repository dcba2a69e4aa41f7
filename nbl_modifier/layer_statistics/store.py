"""
Statistics of a calibration on disk: taken once, solved as often as one likes.

A folder holds ``statistics.json``, which says what they are of, and one safetensors
file per layer, written when that layer is finished: a calibration that was interrupted
goes on at the next layer. Files appear whole or not at all, and each has a digest of
what is in it, so that what was changed or exchanged since is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nbl_modifier.records.files import write_atomically

from .fingerprint import tensors_digest
from .moments import LayerMoments
from .origin import REMEDY, Origin
from .packing import pack_moments, pack_windows, unpack_moments, unpack_windows

__all__ = ["FORMAT_VERSION", "StatisticsStore", "windows_digest"]

# 2 had no digests of tensors, and recognized a model by a sample of its weights.
FORMAT_VERSION = 3
_READABLE = (2, FORMAT_VERSION)
_MANIFEST = "statistics.json"
_WINDOWS = "heldout_windows.safetensors"
_REMEDY_OF_ONE = (
    "Delete the file and calibrate with the same data and folder, which measures what "
    "is missing"
)


class StatisticsStore:
    """
    A folder of statistics.

    :param folder: where
    :param origin: what they are of
    :param version: of its format
    """

    def __init__(
        self, folder: Path, origin: Origin, version: int = FORMAT_VERSION
    ) -> None:
        self.folder = folder
        self.origin = origin
        self.version = version

    @classmethod
    def is_in(cls, folder: str | os.PathLike[str]) -> bool:
        """
        Return whether a calibration has begun to write a store there.

        :param folder: that may or may not exist
        """
        return (Path(folder) / _MANIFEST).exists()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """
        Return the store that a calibration has written.

        :raises ValueError: if there is none, it is damaged, or of a newer version
        """
        path = Path(folder) / _MANIFEST
        if not path.exists():
            raise ValueError(
                f"statistics {folder}: there is no {_MANIFEST}. Pass a folder that a "
                "calibration wrote."
            )
        try:
            fields = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as err:
            _refuse(path, f"is damaged ({err})", REMEDY)
        version = fields.pop("format_version", None)
        if version not in _READABLE:
            raise ValueError(
                f"statistics {folder}: format_version is {version}, this nbl_modifier "
                f"reads {' and '.join(map(str, _READABLE))}. {REMEDY}."
            )
        try:
            origin = Origin.of(fields)
        except ValueError as err:
            _refuse(path, f"is damaged ({err})", REMEDY)
        return cls(Path(folder), origin, version)

    @classmethod
    def version_in(cls, folder: str | os.PathLike[str]) -> int:
        """
        Return the format version that :meth:`create` will go on in, or begin.

        :raises ValueError: as :meth:`open`, for what is there already
        """
        if not cls.is_in(folder):
            return FORMAT_VERSION
        return cls.open(folder).version

    @classmethod
    def create(cls, folder: str | os.PathLike[str], origin: Origin) -> Self:
        """
        Return a store to write to, which may hold layers of an interrupted calibration.

        :raises ValueError: if it holds statistics of something else
        :raises OSError: if it cannot be written
        """
        path = Path(folder)
        if cls.is_in(folder):
            store = cls.open(folder)
            store.origin.check(replace(origin, model=store.origin.model), folder)
            return store
        path.mkdir(parents=True, exist_ok=True)
        fields = {"format_version": FORMAT_VERSION, **origin.fields()}
        write_atomically(path / _MANIFEST, json.dumps(fields, indent=2) + "\n")
        return cls(path, origin)

    def __contains__(self, index: int) -> bool:
        return self._path(index).exists()

    def save(
        self, index: int, name: str, moments: LayerMoments, heldout: LayerMoments | None
    ) -> None:
        """
        Write the statistics of one layer.

        :param index: of the decoder layer
        :param name: of the module
        :param moments: of the tokens to fit on
        :param heldout: of those that are held out
        """
        tensors: dict[str, Tensor] = {}
        metadata = {"format_version": str(self.version), "name": name}
        metadata |= {"origin": json.dumps(self.origin.fields())}
        for part, each in (("fit", moments), ("heldout", heldout)):
            if each is not None:
                more_tensors, said = pack_moments(part, each)
                tensors |= more_tensors
                metadata |= said
        metadata["digest"] = tensors_digest(tensors, metadata)
        _save_atomically(tensors, self._path(index), metadata)

    def load(self, index: int, name: str) -> tuple[LayerMoments, LayerMoments | None]:
        """
        Return the statistics of one layer, on the CPU: to fit on, and held out.

        :param index: of the decoder layer
        :param name: of the module
        :raises ValueError: if the file is damaged, has been changed, or is not of this
            layer and calibration
        """
        path = self._path(index)
        tensors, metadata = _read(path)
        digest = metadata.pop("digest", None)
        if digest is not None or self.version > 2:
            _check_digest(path, tensors_digest(tensors, metadata), digest)
        try:
            origin = json.loads(metadata["origin"])
            if origin != self.origin.fields():
                raise ValueError(
                    f"statistics {path}: of another calibration than {_MANIFEST} "
                    f"beside it, {origin}. {REMEDY}."
                )
            found = metadata["name"]
        except (KeyError, json.JSONDecodeError) as err:
            _refuse(path, f"is damaged (metadata {err})", _REMEDY_OF_ONE)
        if found != name:
            _refuse(
                path, f"holds {found}, but is in the place of {name}", _REMEDY_OF_ONE
            )
        try:
            fit = unpack_moments("fit", tensors, metadata)
            heldout = unpack_moments("heldout", tensors, metadata)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as err:
            _refuse(path, f"is damaged ({err})", _REMEDY_OF_ONE, err)
        if fit is None:
            _refuse(path, "is empty", _REMEDY_OF_ONE)
        return fit, heldout

    def save_windows(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """
        Write the held-out windows, so that losses can be measured without the data.

        A folder that has them is not touched, since it may be there to read only.

        :param batches: what the model is called with
        """
        path, tensors = self.folder / _WINDOWS, pack_windows(batches)
        if path.exists():
            with contextlib.suppress(ValueError):  # damaged
                if tensors_digest(_read(path)[0]) == tensors_digest(tensors):
                    return
        _save_atomically(tensors, path, {})

    def windows(self) -> list[dict[str, Tensor]]:
        """
        Return the held-out windows, batch by batch.

        :raises ValueError: if there are none, or others than were held out
        """
        path = self.folder / _WINDOWS
        if not path.exists():
            raise ValueError(
                f"statistics {self.folder}: there is no {_WINDOWS}, nothing was held "
                f"out. {REMEDY}."
            )
        tensors, _ = _read(path)
        if self.origin.windows_digest is not None or self.version > 2:
            _check_digest(path, tensors_digest(tensors), self.origin.windows_digest)
        try:
            return unpack_windows(tensors)
        except ValueError as err:
            _refuse(path, f"is damaged ({err})", _REMEDY_OF_ONE, err)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"


def windows_digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """
    Return what held-out windows are recognized by.

    :param batches: what the model is called with
    """
    return tensors_digest(pack_windows(batches))


def _refuse(
    path: Path, found: str, remedy: str, cause: Exception | None = None
) -> NoReturn:
    raise ValueError(f"statistics {path}: {found}. {remedy}.") from cause


def _check_digest(path: Path, found: str, recorded: str | None) -> None:
    if found != recorded:
        _refuse(
            path,
            f"has been changed since it was written (its digest is {found}, recorded "
            f"is {recorded})",
            _REMEDY_OF_ONE,
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    Return the tensors and the metadata of a file.

    :raises ValueError: naming it, if it is damaged
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        return load_file(path), metadata
    # A header that was hit may ask torch for anything.
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as err:
        _refuse(path, f"cannot be read ({err})", _REMEDY_OF_ONE, err)


def _save_atomically(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]
) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.replace(path)
    except SafetensorError as err:
        raise OSError(
            f"statistics {path}: cannot be written ({err}). Make room, or choose "
            "another folder."
        ) from err
    finally:
        unfinished.unlink(missing_ok=True)
