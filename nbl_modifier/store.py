"""
Statistics of a calibration on disk: taken once, solved as often as one likes.

A folder holds ``statistics.json``, which says what they are of, and one safetensors
file per layer, written when that layer is finished: a calibration that was interrupted
goes on at the next layer. Files appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .capture import LayerMoments
from .numerics import CovarianceStats, PackedSymmetric
from .report.schema import write_atomically

__all__ = ["Origin", "StatisticsStore"]

FORMAT_VERSION = 2
_MANIFEST = "statistics.json"
_WINDOWS = "heldout_windows.safetensors"
_REMEDY = "Calibrate again into another folder"
_SYMMETRIC = frozenset({"cov_xx", "cov_yy"})  # of which one triangle is stored


@dataclasses.dataclass(frozen=True)
class Origin:
    """
    What statistics are of.

    :param model: name or path, for messages
    :param model_digest: of configuration and weights
    :param data_digest: of the tokens
    :param num_samples: calibration sequences
    :param held_out: those of them that only measure the error
    :param kind: the part of each layer: ``attention`` or ``block``
    :param input: ``residual``, or ``normalized`` where the input norm's output was
        measured too, from which either can be fitted
    """

    model: str
    model_digest: str
    data_digest: str
    num_samples: int
    held_out: int
    kind: str
    input: str


class StatisticsStore:
    """
    A folder of statistics.

    :param folder: where
    :param origin: what they are of
    """

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder = folder
        self.origin = origin

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """
        Return the store that a calibration has written.

        :raises ValueError: if there is none, or of a newer version
        """
        path = Path(folder) / _MANIFEST
        if not path.exists():
            raise ValueError(
                f"statistics {folder}: there is no {_MANIFEST}. Pass a folder that a "
                "calibration with save_statistics wrote."
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"statistics {folder}: format_version is {version}, this nbl_modifier "
                f"reads {FORMAT_VERSION}. {_REMEDY}."
            )
        return cls(Path(folder), Origin(**fields))

    @classmethod
    def create(cls, folder: str | os.PathLike[str], origin: Origin) -> Self:
        """
        Return a store to write to, which may hold layers of an interrupted calibration.

        :raises ValueError: if it holds statistics of something else
        :raises OSError: if it cannot be written
        """
        path = Path(folder)
        if (path / _MANIFEST).exists():
            store = cls.open(folder)
            store.check(dataclasses.replace(origin, model=store.origin.model))
            return store
        path.mkdir(parents=True, exist_ok=True)
        fields = {"format_version": FORMAT_VERSION, **dataclasses.asdict(origin)}
        write_atomically(path / _MANIFEST, json.dumps(fields, indent=2) + "\n")
        return cls(path, origin)

    def check(self, wanted: Origin) -> None:
        """
        Refuse to be used for anything else than what the statistics are of.

        :param wanted: what they are to be used for
        :raises ValueError: naming the difference
        """
        mine = self.origin
        for field, subject in (
            ("model_digest", f"model {wanted.model}"),
            ("data_digest", "calibration data"),
            ("held_out", "number of held-out sequences"),
            ("kind", "kind"),
        ):
            found, needed = getattr(mine, field), getattr(wanted, field)
            if needed and found != needed:
                raise ValueError(
                    f"statistics {self.folder}: taken with {field} {found} (model "
                    f"{mine.model}), but this run's {subject} has {needed}. {_REMEDY}, "
                    "or use the model and data they are of."
                )
        if wanted.input == "normalized" and mine.input != "normalized":
            raise ValueError(
                f"statistics {self.folder}: taken with input {mine.input}, which says "
                "nothing about the output of the input norm, and this run's input is "
                f"normalized. {_REMEDY} with input: normalized, which serves both."
            )

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
        metadata = {"format_version": str(FORMAT_VERSION), "name": name}
        metadata |= {"origin": json.dumps(dataclasses.asdict(self.origin))}
        for part, each in (("fit", moments), ("heldout", heldout)):
            if each is None:
                continue
            metadata[f"{part}.cosine_distance"] = repr(each.cosine_distance)
            for source, stats in (
                ("residual", each.residual),
                ("normalized", each.normalized),
            ):
                if stats is not None:
                    metadata[f"{part}.num_tokens"] = str(stats.num_tokens)
                    tensors |= _tensors(f"{part}.{source}.", stats)
        _save_atomically(tensors, self._path(index), metadata)

    def load(self, index: int) -> tuple[LayerMoments, LayerMoments | None]:
        """
        Return the statistics of one layer, on the CPU: to fit on, and held out.

        :param index: of the decoder layer
        :raises ValueError: if the file is damaged, or not of this calibration
        """
        path = self._path(index)
        try:
            with safe_open(path, "pt") as file:
                metadata: dict[str, str] = file.metadata()
            tensors = load_file(path)
        except (SafetensorError, OSError) as err:
            raise ValueError(f"statistics {path}: cannot be read ({err}).") from err
        origin = json.loads(metadata["origin"])
        if origin != dataclasses.asdict(self.origin):
            raise ValueError(
                f"statistics {path}: of another calibration than {_MANIFEST} beside "
                f"it, {origin}. {_REMEDY}."
            )
        fit = _moments("fit", tensors, metadata)
        if fit is None:
            raise ValueError(f"statistics {path}: is empty. {_REMEDY}.")
        return fit, _moments("heldout", tensors, metadata)

    def save_windows(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """
        Write the held-out windows, so that losses can be measured without the data.

        :param batches: what the model is called with
        """
        tensors = {
            f"{number}.{name}": value.cpu().contiguous()
            for number, batch in enumerate(batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        _save_atomically(tensors, self.folder / _WINDOWS, {})

    def windows(self) -> list[dict[str, Tensor]]:
        """
        Return the held-out windows, batch by batch.

        :raises ValueError: if there are none
        """
        path = self.folder / _WINDOWS
        if not path.exists():
            raise ValueError(
                f"statistics {self.folder}: there is no {_WINDOWS}, nothing was held "
                f"out. {_REMEDY}."
            )
        batches: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(path).items():
            number, _, name = key.partition(".")
            batches.setdefault(int(number), {})[name] = tensor
        return [batches[number] for number in sorted(batches)]

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"


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
            "another folder for save_statistics."
        ) from err
    finally:
        unfinished.unlink(missing_ok=True)


def _tensors(prefix: str, stats: CovarianceStats) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for field in dataclasses.fields(stats):
        value = getattr(stats, field.name)
        if isinstance(value, Tensor):
            if field.name in _SYMMETRIC:
                value = PackedSymmetric.pack(value).values
            tensors[prefix + field.name] = value.cpu().contiguous()
    return tensors


def _moments(
    part: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> LayerMoments | None:
    if f"{part}.num_tokens" not in metadata:
        return None

    def stats(source: str) -> CovarianceStats | None:
        prefix = f"{part}.{source}."
        fields: dict[str, Any] = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if not fields:
            return None
        for name in _SYMMETRIC & fields.keys():
            fields[name] = PackedSymmetric(fields[name]).dense()
        fields.setdefault("cov_yy", None)
        return CovarianceStats(num_tokens=int(metadata[f"{part}.num_tokens"]), **fields)

    residual = stats("residual")
    assert residual is not None
    return LayerMoments(
        residual, stats("normalized"), float(metadata[f"{part}.cosine_distance"])
    )
