# SPDX-License-Identifier: Apache-2.0
"""Sources of text, and their packing into full windows that start with BOS once."""

import dataclasses
import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.evaluation.texts import (
    HUB_TEXTS,
    calibration_windows,
    hub_texts,
    is_local,
    load_texts,
    pack,
    stdlib_texts,
)

BOS = 0


class FakeTokenizer:
    """
    One token per character, its code point; with or without a BOS of its own.

    :param adds_bos: whether calling it puts BOS in front
    :param has_bos: whether there is a BOS token at all
    """

    def __init__(self, adds_bos: bool = False, has_bos: bool = True) -> None:
        self.adds_bos = adds_bos
        self.bos_token_id = BOS if has_bos else None

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        ids = [ord(character) for character in text]
        return {"input_ids": [BOS, *ids] if self.adds_bos else ids}


def tokenizer(adds_bos: bool = False, has_bos: bool = True) -> Any:
    """Return a fake that passes for one of transformers'."""
    return FakeTokenizer(adds_bos, has_bos)


def rows(texts: list[str], fake: Any, *args: Any) -> list[list[int]]:
    """Return the ``input_ids`` of the packed windows."""
    return pack(texts, fake, *args)["input_ids"][:]


def test_windows_are_full_and_documents_start_with_bos() -> None:
    packed = pack(["abc", "defg"], tokenizer(), 4)
    a, b, c, d, e, f, _ = map(ord, "abcdefg")
    assert packed["input_ids"][:] == [[BOS, a, b, c], [BOS, d, e, f]]
    assert packed["attention_mask"][:] == [[1] * 4, [1] * 4]


def test_bos_is_not_doubled() -> None:
    texts = ["abc", "defg"]
    assert rows(texts, tokenizer(True), 4) == rows(texts, tokenizer(), 4)


def test_tokenizer_without_bos_gets_none() -> None:
    assert rows(["ab", "cd"], tokenizer(has_bos=False), 2) == [
        [ord("a"), ord("b")],
        [ord("c"), ord("d")],
    ]


def test_num_sequences_is_an_upper_limit_and_stops_reading() -> None:
    def texts() -> Any:
        yield "x" * 20
        raise AssertionError("read further than needed")

    assert len(pack(texts(), tokenizer(), 5, 4)) == 4
    assert len(pack(["x" * 20], tokenizer(), 5, 9)) == 4


@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    seq_length=st.integers(2, 7),
)
def test_packing_loses_only_the_tail(texts: list[str], seq_length: int) -> None:
    # a text that starts with the BOS token has its own
    texts = [text for text in texts if not text.startswith("\0")]
    stream = [token for text in texts for token in (BOS, *map(ord, text))]
    if len(stream) < seq_length:
        with pytest.raises(ValueError, match="not one window"):
            rows(texts, tokenizer(), seq_length)
        return
    windows = rows(texts, tokenizer(), seq_length)
    joined = [token for window in windows for token in window]
    assert joined == stream[: len(stream) // seq_length * seq_length]


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(ValueError, match="has 4 tokens, not one window of 8"):
        rows(["abc"], tokenizer(), 8)


@pytest.mark.parametrize("sizes", [(1, 1), (0, 1), (4, 0), (4, -1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="seq_length >= 2 and num_sequences >= 1"):
        rows(["abcdefgh"], tokenizer(), *sizes)


def test_stdlib_splits_are_disjoint_and_reproducible() -> None:
    calibration, heldout = stdlib_texts("calibration"), stdlib_texts("heldout")
    assert calibration == stdlib_texts("calibration")
    assert heldout == stdlib_texts("heldout")
    assert not set(calibration) & set(heldout)
    assert len(calibration) > 100
    assert len(heldout) > 50


def test_stdlib_halves_are_packages_and_top_level_modules() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    assert (root / "argparse.py").read_text("utf-8") not in stdlib_texts("calibration")
    assert (root / "shutil.py").read_text("utf-8") in stdlib_texts("heldout")
    calibration = stdlib_texts("calibration")
    assert (root / "json" / "decoder.py").read_text("utf-8") in calibration
    for excluded in ("encodings/cp1252.py", "pydoc_data/topics.py"):
        assert (root / excluded).read_text("utf-8") not in calibration


def test_seed_draws_the_order_only() -> None:
    first, second = stdlib_texts("calibration", 0), stdlib_texts("calibration", 1)
    assert first != second
    assert sorted(first) == sorted(second)


def test_python_without_source_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="no Python source files under .*Pass a text"):
        stdlib_texts("heldout")


def write(path: Path, content: str) -> str:
    """Write a file and return its name."""
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "first"),
        ("a.jsonl", json.dumps({"text": "first"})),
        ("a.json", json.dumps([{"text": "first"}])),
        ("a.csv", "id,text\n1,first\n"),
    ],
)
def test_files_of_every_kind(tmp_path: Path, name: str, content: str) -> None:
    assert load_texts(write(tmp_path / name, content), "calibration") == ["first"]


def test_parquet_and_another_column(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    Dataset.from_dict({"body": ["one", None, "  ", "two"]}).to_parquet(str(path))
    assert load_texts(str(path), "heldout", text_column="body") == ["one", "two"]


def test_folder_is_read_in_order_and_skips_other_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.md", "first")
    write(tmp_path / "sub" / "c.py", "third")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    write(tmp_path / "sub" / "d.jsonl", json.dumps({"text": "fourth"}))
    texts = load_texts(str(tmp_path), "heldout")
    assert texts == ["first", "second", "third", "fourth"]


def test_packed_table_is_read_and_packed_text_refused(tmp_path: Path) -> None:
    table, text = tmp_path / "a.json.gz", tmp_path / "a.txt.gz"
    table.write_bytes(gzip.compress(b'{"text": "first"}\n{"text": "second"}'))
    text.write_bytes(gzip.compress(b"first"))
    assert load_texts(str(table), "heldout") == ["first", "second"]
    with pytest.raises(ValueError, match="is no text file. Unpack it"):
        load_texts(str(text), "heldout")


def test_rows_may_hold_anything_beside_the_text(tmp_path: Path) -> None:
    """As the Pile's do."""
    rows = [
        {"text": "first", "meta": {"pile_set_name": "Github"}},
        {"text": "second", "meta": {"stars": [1, 2]}},
        {"text": None, "meta": "none"},
    ]
    path = write(tmp_path / "pile.jsonl", "\n".join(map(json.dumps, rows)))
    assert load_texts(path, "heldout") == ["first", "second"]


def test_seed_draws_the_order_of_calibration_documents(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(20)]
    path = write(tmp_path / "a.json", json.dumps(rows))
    first, second = (load_texts(path, "calibration", seed=seed) for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert load_texts(path, "calibration", seed=0) == first
    assert load_texts(path, "heldout") == [row["text"] for row in rows]


def test_windows_of_a_single_document_are_drawn() -> None:
    text = "".join(map(chr, range(100, 200)))
    everything = rows([text], tokenizer(), 4)
    drawn = [
        calibration_windows([text], tokenizer(), 4, 5, seed)["input_ids"][:]
        for seed in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    for windows in drawn:
        assert len(windows) == 5
        assert all(window in everything for window in windows)
        assert len({tuple(window) for window in windows}) == 5
    assert len(calibration_windows([text], tokenizer(), 4, 1000)) == len(everything)


def test_several_documents_are_packed_as_they_come() -> None:
    texts = ["abc", "defg", "hij"]
    windows = calibration_windows(iter(texts), tokenizer(), 4, 2, seed=3)
    assert windows["input_ids"][:] == rows(texts, tokenizer(), 4, 2)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's corpora be folders here, which `datasets` reads alike."""
    for name, corpus in HUB_TEXTS.items():
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"text": f"{name} {i}\n"}) for i in range(30)]
        write(folder / "train.jsonl", "\n".join(lines))
        local = dataclasses.replace(corpus, path=str(folder), config=None)
        monkeypatch.setitem(HUB_TEXTS, name, local)


def test_documents_of_the_hub_come_in_random_order(mirror: None) -> None:
    first, second = (list(hub_texts("c4", seed=seed)) for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(f"c4 {i}\n" for i in range(30))


def test_lines_of_wikitext_are_one_text(mirror: None) -> None:
    (text,) = hub_texts("wikitext")
    assert text == "".join(f"wikitext {i}\n" for i in range(30))


def test_unknown_split_of_the_hub_is_named(mirror: None) -> None:
    with pytest.raises(ValueError, match=r"nope: cannot be read from the hub \("):
        list(hub_texts("c4", split="nope"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.bin", "text\0", "is no text file"),
        (
            "a.csv",
            "id,body\n1,x\n",
            r"no column 'text', it has \['body', 'id'\].*--text",
        ),
        ("a.json", "{nope", "cannot be read as json"),
    ],
)
def test_unusable_files_are_named_with_the_remedy(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_texts(source, "calibration")
    assert source in str(error.value)


def test_missing_file_offers_the_built_in_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*'stdlib'"):
        load_texts(str(tmp_path / "no.txt"), "calibration")


def test_what_is_local_and_what_is_a_name(tmp_path: Path) -> None:
    local = ["stdlib", str(tmp_path), "./x", "missing.jsonl", "a.json.gz", "~/text"]
    assert all(is_local(source) for source in local)
    assert not any(is_local(source) for source in ("c4", "org/name", "ultrachat_200k"))
