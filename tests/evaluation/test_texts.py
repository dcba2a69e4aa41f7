# SPDX-License-Identifier: Apache-2.0
"""Sources of text: each read as it is, in an order that a seed draws, or refused."""

import dataclasses
import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from nbl_modifier.evaluation.texts import (
    HUB_TEXTS,
    hub_texts,
    is_local,
    load_texts,
    stdlib_texts,
)


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
