# SPDX-License-Identifier: Apache-2.0
"""Values of options, checked where they are parsed, and options without effect."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Parser",
    "first_line",
    "fraction",
    "path",
    "positive",
    "positive_number",
    "refuse_idle",
    "seed",
    "text",
]

_LARGEST = 2**31 - 1
_LARGEST_SEED = 2**63 - 1  # what torch, Python and numpy all take
_LONGEST_NAME = 255  # bytes, of most file systems


class Parser(argparse.ArgumentParser):
    """A parser that tells, as ``given``, which arguments were on the command line."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """
        Parse, see argparse.

        :param args: the command line
        :param namespace: what to set the values on
        """
        known, rest = super().parse_known_args(args, namespace)
        if self._subparsers is None:  # a command's own
            defaults = {action: action.default for action in self._actions}
            for action in defaults:
                action.default = argparse.SUPPRESS
            again, _ = super().parse_known_args(args, argparse.Namespace())
            for action, default in defaults.items():
                action.default = default
            known.given = frozenset(vars(again)) - {"run"}
        return known, rest


def refuse_idle(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """
    Refuse options that were given and have no effect.

    :param args: parsed by a :class:`Parser`
    :param names: of the options, as attributes of ``args``
    :param why: what makes them so, and what to do instead of leaving them out
    :raises ValueError: naming the first one
    """
    for name in names:
        if name in getattr(args, "given", ()):
            option, value = name.replace("_", "-"), getattr(args, name)
            raise ValueError(
                f"--{option} {value}: has no effect {why}. Leave the option out."
            )


def first_line(err: BaseException) -> str:
    """Return what an error says, without the advice that follows."""
    lines = str(err).strip().splitlines()
    return lines[0] if lines else type(err).__name__


def text(value: str) -> str:
    """Return an option's value that is not empty."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"must not be empty, got {value!r}")
    return value


def path(value: str) -> str:
    """Return an option's value as a path, or the name of a model, ``~`` expanded."""
    expanded = os.path.expanduser(text(value))  # noqa: PTH111  keeps ~nobody as it is
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(expanded).parts):
        raise argparse.ArgumentTypeError(
            f"is longer than a file name can be, got {value[:40]!r}..."
        )
    return expanded


def _integer(value: str, smallest: int, largest: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = smallest - 1
    if not smallest <= number <= largest:
        raise argparse.ArgumentTypeError(
            f"must be an integer from {smallest} to {largest}, got {value[:40]!r}"
        )
    return number


def positive(value: str) -> int:
    """Return an option's value as an integer that is at least 1."""
    return _integer(value, 1, _LARGEST)


def seed(value: str) -> int:
    """Return an option's value as the seed of a generator."""
    return _integer(value, 0, _LARGEST_SEED)


def positive_number(value: str) -> float:
    """Return an option's value as a number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(
            f"must be a number above 0, got {value[:40]!r}"
        )
    return number


def fraction(value: str) -> float:
    """Return an option's value as a part of a whole, in (0, 1]."""
    number = positive_number(value)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {value[:40]!r}")
    return number
