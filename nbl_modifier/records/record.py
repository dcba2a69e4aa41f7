# SPDX-License-Identifier: Apache-2.0
"""
How a record becomes a JSON file and is read again.

Records are dataclasses of pydantic: their fields are checked whenever one is made, by
a run, by ``dataclasses.replace`` or from a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .files import write_atomically

__all__ = ["CHECKED", "OPEN", "Record"]

#: Of a record that this package alone writes: a field it does not know is an error.
CHECKED = ConfigDict(extra="forbid")
#: Of a record that other programs write too: what else they note is left alone.
OPEN = ConfigDict(extra="ignore")

_MAX_ERRORS = 3
_MAX_VALUE = 60


class Record:
    """A record that is a file of its own: a frozen dataclass of pydantic below it."""

    #: What it is, with an article, for messages.
    TITLE: ClassVar[str]
    #: What to do about a file that is none.
    REMEDY: ClassVar[str]
    #: Version of the layout that is written, and the newest that is read.
    VERSION: ClassVar[int] = 1
    #: Spaces a level of the JSON text is indented by.
    INDENT: ClassVar[int] = 2

    def to_json(self) -> str:
        """
        Return the record as indented JSON text.

        :raises ValueError: if a number is NaN or infinite, which JSON cannot hold
        """
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return json.dumps(fields, indent=self.INDENT, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """
        Return the record that ``to_json`` wrote.

        :param text: JSON text
        :raises ValueError: if it is no such record, naming the fields that are wrong,
            or is of a newer version
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as err:
            raise cls._refusal(f"invalid JSON ({err})") from err
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if not isinstance(version, int):
            raise cls._refusal(
                "expected a JSON object with an integer format_version, got "
                f"{_shortened(version if isinstance(fields, dict) else fields)}"
            )
        if version > cls.VERSION:
            raise ValueError(
                f"format_version is {version}, this nbl_modifier reads {cls.TITLE} up "
                f"to {cls.VERSION}. Update it: pip install --upgrade nbl-modifier."
            )
        try:
            return cls._adapter().validate_json(text, strict=True)
        except ValidationError as err:
            raise cls._refusal(_described(err)) from err

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Write the record to ``path``; a reader sees the old file or the new, never half.

        :param path: file to write, its directory must exist
        """
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """
        Read the record from ``path``.

        :param path: a file written by ``save``
        :raises ValueError: if it is no such record; the message names the file
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as err:
            raise ValueError(f"{path}: {cls._refusal(f'not UTF-8 ({err})')}") from err
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from err

    @classmethod
    @cache
    def _adapter(cls) -> TypeAdapter[Self]:
        return TypeAdapter(cls)

    @classmethod
    def _refusal(cls, why: str) -> ValueError:
        return ValueError(f"not {cls.TITLE}: {why}. {cls.REMEDY}")


def _described(err: ValidationError) -> str:
    """Return which fields are wrong, and how."""
    errors = err.errors(include_url=False)
    texts = []
    for each in errors[:_MAX_ERRORS]:
        field = ".".join(map(str, each["loc"]))
        text = f"{field}: {each['msg'][:1].lower()}{each['msg'][1:]}"
        if each["type"] != "missing":
            text += f", got {_shortened(each['input'])}"
        texts.append(text)
    if len(errors) > _MAX_ERRORS:
        texts.append(f"and {len(errors) - _MAX_ERRORS} more")
    return "; ".join(texts)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"
