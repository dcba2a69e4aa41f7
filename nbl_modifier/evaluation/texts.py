# SPDX-License-Identifier: Apache-2.0
"""
Calibration and held-out text: built in, from files, from the hub.

`datasets` is imported inside the functions that need it.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STDLIB = "stdlib"
Split = Literal["calibration", "heldout"]

# Tests, other people's packages, and `encodings`, which is tables rather than code.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
)
# Shorter files say nothing, longer ones are generated tables.
_MIN_CHARACTERS, _MAX_CHARACTERS = 400, 60_000
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py"})
# `datasets` unpacks tables so packed; zst needs the package zstandard.
_PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
_TABLE_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# C4 is too large to download whole, and is read as far as it is needed.
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class HubText:
    """
    A text corpus on the Hugging Face hub.

    :param path: repository
    :param config: configuration if none is asked for; None for its only one
    :param is_one_text: whether its rows are the lines of one text, not documents
    """

    path: str
    config: str | None
    is_one_text: bool


# The paper's calibration texts, under llm-compressor's names for them.
HUB_TEXTS = {
    "c4": HubText("allenai/c4", "en", is_one_text=False),
    "wikitext": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", is_one_text=True),
}


def is_local(source: str) -> bool:
    """
    Return True if ``source`` is the built-in text or names a file or folder.

    Everything else is a dataset name, for llm-compressor to resolve.

    :param source: ``stdlib``, a path, or a dataset name
    """
    looks_like_path = source.startswith((".", "~", os.sep)) or (
        _suffix(Path(source)) in _TEXT_SUFFIXES | set(_TABLE_BUILDERS)
    )
    return bool(source) and (
        source == STDLIB or looks_like_path or Path(source).exists()
    )


def is_table(source: str) -> bool:
    """
    Return True if a file is a table by its name, packed with gzip and the like or not.

    :param source: the path
    """
    return _suffix(Path(source)) in _TABLE_BUILDERS


def is_packed(source: str) -> bool:
    """
    Return True if ``source`` is packed here, not prepared by llm-compressor.

    :param source: as for ``is_local``
    """
    return is_local(source) or source in HUB_TEXTS


def load_texts(
    source: str, split: Split, text_column: str = "text", seed: int = 0
) -> list[str]:
    """
    Return the documents of a local source.

    :param source: ``stdlib``, or a text file, a .json, .jsonl, .csv or .parquet table,
        packed with gzip or not, or a folder of these
    :param split: which half of ``stdlib``, which other sources do not have;
        calibration documents are in random order
    :param text_column: column that holds the text in a table
    :param seed: of that order
    :return: non-empty texts
    :raises FileNotFoundError: if the path does not exist
    :raises ValueError: if there is no text in it, or no such column
    """
    if source == STDLIB:
        return stdlib_texts(split, seed)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"dataset {source}: no such file or folder. Check the path, or pass "
            f"'{STDLIB}' for the built-in text."
        )
    texts = [text for text in _read(path, text_column) if text and text.strip()]
    if not texts:
        raise ValueError(
            f"dataset {source}: holds no text. Pass a file with text in it, or "
            f"'{STDLIB}' for the built-in text."
        )
    if split == "calibration":
        random.Random(seed).shuffle(texts)
    return texts


def hub_texts(
    name: str, config: str | None = None, split: str | None = None, seed: int = 0
) -> Iterator[str]:
    """
    Yield the documents of a text corpus on the hub, in random order, as they arrive.

    :param name: a key of ``HUB_TEXTS``
    :param config: configuration, None for the usual one
    :param split: None for ``train``
    :param seed: of the order
    :raises ValueError: if it cannot be read
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    corpus = HUB_TEXTS[name]
    config, split = config or corpus.config, split or "train"
    try:
        rows = load_dataset(corpus.path, config, split=split, streaming=True)
        if corpus.is_one_text:
            yield "".join(row["text"] for row in rows)
            return
        for row in rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER):
            yield row["text"]
    except (OSError, ValueError, DatasetNotFoundError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ValueError(
            f"{corpus.path}, {config}, {split}: cannot be read from the hub "
            f"({reason}). Check the network and HF_HUB_OFFLINE, or pass a file."
        ) from err


def stdlib_texts(split: Split, seed: int = 0) -> list[str]:
    """
    Return source files of the running interpreter's standard library.

    The text differs between Python versions, so a result made with it must name the
    version (`NBLReport.versions` does). Files of 400 to 60,000 characters; no tests,
    no installed packages.

    :param split: ``calibration`` is modules inside packages, in an order drawn by
        ``seed``; ``heldout`` is top-level modules, in order of their names
    :param seed: order of the calibration files
    :raises ValueError: if this Python has no source files, such as a frozen one
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (
        sorted(root.glob("*.py"))
        if split == "heldout"
        else sorted(path for path in root.glob("*/**/*.py") if _is_library(path, root))
    )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    texts = [text for text in texts if _MIN_CHARACTERS <= len(text) <= _MAX_CHARACTERS]
    if not texts:
        raise ValueError(
            f"dataset {STDLIB}: no Python source files under {root}. Pass a text file "
            "instead, or use a Python that ships its source."
        )
    if split == "calibration":
        random.Random(seed).shuffle(texts)
    return texts


def _suffix(path: Path) -> str:
    """Return the suffix in lower case, of a packed file that of what is inside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_library(path: Path, root: Path) -> bool:
    return _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)


def _read(path: Path, text_column: str) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            if _suffix(file) in _TEXT_SUFFIXES | set(_TABLE_BUILDERS):
                yield from _read(file, text_column)
    elif _suffix(path) in _TABLE_BUILDERS:
        yield from _read_table(path, text_column)
    else:
        yield _read_text(path)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix.lower() in _PACKED_SUFFIXES or b"\0" in content[:4096]:
        raise ValueError(
            f"dataset {path}: is no text file. Unpack it, or pass a table: "
            f"{', '.join(_TABLE_BUILDERS)}, packed or not."
        )
    return content.decode("utf-8", errors="replace")


def _read_table(path: Path, text_column: str) -> list[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.stat().st_size == 0:  # datasets would raise about a missing schema
        return []
    builder = _TABLE_BUILDERS[_suffix(path)]
    try:
        table = load_dataset(builder, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, TypeError, LookupError, OSError) as err:
        reason = str(err.__cause__ or err) or type(err).__name__
        raise ValueError(
            f"dataset {path}: cannot be read as {builder} ({reason}). Check the file."
        ) from err
    if text_column not in table.column_names:
        raise ValueError(
            f"dataset {path}: no column '{text_column}', it has "
            f"{sorted(table.column_names)}. Pass --text-column with one of them."
        )
    return [str(value) for value in table[text_column] if value is not None]
