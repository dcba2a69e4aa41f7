# SPDX-License-Identifier: Apache-2.0
"""
Documents of the offline lm-eval tasks, made from the standard library's source.

The YAML files in ``tasks/`` name the functions here. Everything is drawn from the
held-out modules (:func:`.texts.stdlib_texts`), which calibration never sees,
in an order drawn by a fixed seed, so the first documents are a fair sample of all. The
same Python version makes the same documents.
"""

from __future__ import annotations

import builtins
import functools
import io
import itertools
import keyword
import random
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .texts import stdlib_texts

if TYPE_CHECKING:
    from datasets import Dataset

_Maker = Callable[[str, random.Random], Iterator[dict[str, Any]]]
_T = TypeVar("_T")

SPLIT = "test"
NUM_CHOICES = 4

_SEED = 0
# About three characters per token with the bundled tokenizer, more with larger ones: a
# document fits in 256 tokens, the context that the bundled model was trained on.
_MAX_CHARACTERS = 700
_MIN_CHARACTERS = 350
# Room for the answer is left.
_MAX_CONTEXT = 600
_MAX_PER_MODULE = 20

_MIN_LINE_CHARACTERS = 12
_MIN_NAME_CHARACTERS = 4
# Between the earlier occurrence of a name and the place to recall it.
_MIN_DISTANCE = 300
# Wrong answers are drawn from this many, those closest to the right one in length.
_CLOSEST = 8
_UNNAMED = frozenset({*keyword.kwlist, *keyword.softkwlist, *dir(builtins)})
_LAST_WORD = re.compile(r"\s*\S*$")


@dataclass(frozen=True)
class _Name:
    """
    An identifier in a module.

    :param text: the identifier
    :param start: offset of its first character
    :param before: the two tokens before it on the same line, or as many as there are
    """

    text: str
    start: int
    before: tuple[str, ...]


def perplexity_documents(count: int, **_: Any) -> dict[str, Dataset]:
    """
    Return pieces of modules, cut at line ends, 350 to 700 characters each.

    :param count: documents
    :return: split to rows with ``text``
    """
    return _dataset(_pieces, count)


def next_line_documents(count: int, **_: Any) -> dict[str, Dataset]:
    """
    Return beginnings of which the next line is to be chosen.

    The wrong lines come from the same module, are indented alike, are about as long,
    and do not occur in the beginning.

    :param count: documents
    :return: split to rows with ``context``, ``choices`` and ``answer``, an index
    """
    return _dataset(_next_lines, count)


def recall_documents(count: int, **_: Any) -> dict[str, Dataset]:
    """
    Return beginnings that end where an identifier of long before is used again.

    The identifier last occurs at least 300 characters earlier, about 90 tokens of the
    bundled tokenizer. The wrong ones are used in the same module after the same two
    tokens, are about as long, and do not occur in the beginning: who cannot look back
    has no way to tell.

    :param count: documents
    :return: split to rows with ``context``, ``choices`` and ``answer``, an index
    """
    return _dataset(_recalls, count)


def perplexity_results(
    document: dict[str, str], results: list[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """
    Return what lm-eval sums over documents to bits per byte and perplexities.

    :param document: a row of ``perplexity_documents``
    :param results: log-likelihood of its text in nats, and whether it was greedy
    """
    text = document["text"]
    ((log_likelihood, _),) = results
    num_bytes, num_words = len(text.encode("utf-8")), len(text.split())
    return {
        "bits_per_byte": (log_likelihood, num_bytes),
        "byte_perplexity": (log_likelihood, num_bytes),
        "word_perplexity": (log_likelihood, num_words),
    }


def _dataset(make: _Maker, count: int) -> dict[str, Dataset]:
    from datasets import Dataset

    rows = _rows(make)
    if len(rows) < count:
        raise ValueError(
            f"the standard library of this Python gives {len(rows)} documents, "
            f"{count} were asked for. Use a CPython with its source files."
        )
    return {SPLIT: Dataset.from_list(rows[:count])}


@functools.cache
def _rows(make: _Maker) -> list[dict[str, Any]]:
    """
    Return rows in random order, at most ``_MAX_PER_MODULE`` from each module.

    :param make: yields the rows of a module in random order
    """
    rng = random.Random(_SEED)
    rows = [
        row
        for text in stdlib_texts("heldout")
        for row in itertools.islice(make(text, rng), _MAX_PER_MODULE)
    ]
    rng.shuffle(rows)
    return rows


def _pieces(text: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    pieces, piece = [], ""
    for line in [*text.splitlines(keepends=True), None]:
        if line is None or len(piece) + len(line) > _MAX_CHARACTERS:
            if _MIN_CHARACTERS <= len(piece) <= _MAX_CHARACTERS:
                pieces.append({"text": piece})
            piece = ""
        piece += line or ""
    yield from _shuffled(pieces, rng)


def _next_lines(text: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    lines = text.splitlines(keepends=True)
    starts = itertools.accumulate(map(len, lines), initial=0)
    numbered = [
        (start, line)
        for start, line in zip(starts, lines, strict=False)
        if len(line.strip()) >= _MIN_LINE_CHARACTERS
    ]
    alike: dict[str, set[str]] = {}
    for _, line in numbered:
        alike.setdefault(_indentation(line), set()).add(line)
    for start, line in _shuffled(numbered, rng):
        context = text[_window_start(text, start - _MAX_CONTEXT) : start]
        others = {
            other
            for other in alike[_indentation(line)]
            if other.strip() != line.strip() and other.strip() not in context
        }
        if len(context) >= _MIN_CHARACTERS:
            yield from _question(context, line, others, rng)


def _recalls(text: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    names = list(_names(text))
    times = Counter(name.text for name in names)
    names = [name for name in names if times[name.text] > 1]
    alike: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        alike.setdefault(name.before, set()).add(name.text)
    for name in _shuffled(names, rng):
        start = _window_start(text, name.start - _MAX_CONTEXT)
        context = text[start : name.start]
        far, near = context[:-_MIN_DISTANCE], context[-_MIN_DISTANCE:]
        if name.text in near or not re.search(rf"\b{name.text}\b", far):
            continue
        others = {other for other in alike[name.before] if other not in context}
        # An answer begins where the last word does, with the white space before it:
        # every tokenizer can be cut there.
        head = _LAST_WORD.sub("", context)
        tail = context[len(head) :]
        yield from _question(
            head, tail + name.text, {tail + other for other in others}, rng
        )


def _question(
    context: str, right: str, others: set[str], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield a row with the right answer at a random place, or none."""
    ordered = sorted(others, key=lambda other: (abs(len(other) - len(right)), other))
    if len(ordered) < NUM_CHOICES - 1:
        return
    choices = rng.sample(ordered[:_CLOSEST], NUM_CHOICES - 1)
    answer = rng.randrange(NUM_CHOICES)
    choices.insert(answer, right)
    yield {"context": context, "choices": choices, "answer": answer}


def _names(text: str) -> Iterator[_Name]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):  # code that only older Pythons read
        return
    for _, group in itertools.groupby(tokens, key=lambda token: token.start[0]):
        before: tuple[str, ...] = ()
        for token in group:
            if (
                token.type == tokenize.NAME
                and len(token.string) >= _MIN_NAME_CHARACTERS
                and token.string not in _UNNAMED
            ):
                row, column = token.start
                yield _Name(token.string, starts[row - 1] + column, before)
            if token.string.strip():  # indentation is a token too
                before = (*before[-1:], token.string)


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _window_start(text: str, offset: int) -> int:
    """Return the start of the first line at or after ``offset``."""
    return 0 if offset <= 0 else text.find("\n", offset - 1) + 1


def _shuffled(items: Sequence[_T], rng: random.Random) -> list[_T]:
    return rng.sample(items, len(items))
