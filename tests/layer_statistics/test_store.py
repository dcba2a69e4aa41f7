# SPDX-License-Identifier: Apache-2.0
"""The folder of statistics: exact, whole or absent, and only of what it says."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nbl_modifier.layer_statistics.fingerprint import tensors_digest
from nbl_modifier.layer_statistics.moments import LayerMoments, LayerStatistics
from nbl_modifier.layer_statistics.origin import Origin
from nbl_modifier.layer_statistics.store import StatisticsStore, windows_digest
from nbl_modifier.numerics import CovarianceStats

ORIGIN = Origin("some/model", "0123", "4567", 8, 1, "attention", "normalized")
WIDTH = 6


def moments(seed: int = 0, normalized: bool = True) -> LayerMoments:
    generator = torch.Generator().manual_seed(seed)
    statistics = LayerStatistics("layer", WIDTH, normalized, torch.device("cpu"))
    residual, norm, output = torch.randn(3, 1, 20, WIDTH, generator=generator)
    statistics.update(residual, norm, output, None)
    return statistics.finalize()


def some_windows(first: int = 0) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.tensor([[i, 1]]), "attention_mask": torch.ones(1, 2)}
        for i in range(first, first + 12)
    ]


def of(windows: list[dict[str, torch.Tensor]]) -> Origin:
    return replace(ORIGIN, windows_digest=windows_digest(windows))


def rewrite(folder: Path, fields: dict[str, Any], **metadata: str) -> None:
    """Let a folder and its layers say something else of what they are of."""
    (folder / "statistics.json").write_text(json.dumps(fields))
    origin = {name: fields[name] for name in fields if name != "format_version"}
    for file in folder.glob("layer-*.safetensors"):
        with safe_open(file, "pt") as opened:
            before = opened.metadata()
        del before["digest"]
        tensors = load_file(file)
        after = before | metadata | {"origin": json.dumps(origin)}
        if fields["format_version"] > 2:
            after["digest"] = tensors_digest(tensors, after)
        save_file(tensors, file, metadata=after)


def make_version_2(folder: Path) -> None:
    """Turn a folder into what commit 0f3852f would have written."""
    path = folder / "statistics.json"
    fields = json.loads(path.read_text()) | {"format_version": 2}
    for later in ("windows_digest", "loss_masks"):
        fields.pop(later, None)
    rewrite(folder, fields, format_version="2")


def assert_same(mine: CovarianceStats | None, theirs: CovarianceStats | None) -> None:
    assert (mine is None) == (theirs is None)
    if mine is None or theirs is None:
        return
    for field in fields(CovarianceStats):
        value, expected = getattr(mine, field.name), getattr(theirs, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value, expected)
        else:
            assert value == expected


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_layers_come_back_bit_for_bit(
    tmp_path: Path, normalized: bool, held_out: bool
) -> None:
    fit = moments(0, normalized)
    heldout = moments(1, normalized) if held_out else None
    StatisticsStore.create(tmp_path, ORIGIN).save(3, "layer 3", fit, heldout)
    store = StatisticsStore.open(tmp_path)
    assert store.origin == ORIGIN
    assert [index for index in range(5) if index in store] == [3]
    back_fit, back_heldout = store.load(3, "layer 3")
    for mine, theirs in ((back_fit, fit), (back_heldout, heldout)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert_same(mine.residual, theirs.residual)
            assert_same(mine.normalized, theirs.normalized)
            assert mine.cosine_distance == theirs.cosine_distance


def test_windows_come_back_in_order(tmp_path: Path) -> None:
    windows = some_windows()
    store = StatisticsStore.create(tmp_path, of(windows))
    store.save_windows(windows)
    back = store.windows()
    assert [int(batch["input_ids"][0, 0]) for batch in back] == list(range(12))
    assert back[0].keys() == windows[0].keys()


def test_no_file_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StatisticsStore.create(tmp_path, ORIGIN)

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("nbl_modifier.layer_statistics.store.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.save(0, "layer", moments(), None)
    assert 0 not in store
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.json"]


def test_a_damaged_file_names_itself(tmp_path: Path) -> None:
    store = StatisticsStore.create(tmp_path, ORIGIN)
    store.save(0, "layer", moments(), None)
    path = tmp_path / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors: cannot be read"):
        store.load(0, "layer")


def test_a_layer_of_another_calibration_is_refused(tmp_path: Path) -> None:
    for name, digest in (("one", "1111"), ("two", "2222")):
        store = StatisticsStore.create(
            tmp_path / name, replace(ORIGIN, data_digest=digest)
        )
        store.save(0, "layer", moments(), None)
    file = "layer-00000.safetensors"
    (tmp_path / "one" / file).replace(tmp_path / "two" / file)
    with pytest.raises(ValueError, match="of another calibration than statistics.json"):
        StatisticsStore.open(tmp_path / "two").load(0, "layer")


def test_a_folder_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    StatisticsStore.create(tmp_path, ORIGIN)
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 4}))
    with pytest.raises(ValueError, match="format_version is 4, this"):
        StatisticsStore.open(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no statistics\.json"):
        StatisticsStore.open(tmp_path)
    with pytest.raises(ValueError, match="nothing was held out"):
        StatisticsStore.create(tmp_path, ORIGIN).windows()


def test_a_full_disk_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    store = StatisticsStore.create(tmp_path, ORIGIN)
    monkeypatch.setattr("nbl_modifier.layer_statistics.store.save_file", full_disk)
    with pytest.raises(OSError, match=r"layer-00000.* cannot be written .*No space"):
        store.save(0, "layer", moments(), None)


@pytest.mark.parametrize("version", [2, 3])
def test_exchanged_layers_are_refused(tmp_path: Path, version: int) -> None:
    store = StatisticsStore.create(tmp_path, ORIGIN)
    for index in (0, 1):
        store.save(index, f"layers.{index}", moments(index), None)
    if version == 2:
        make_version_2(tmp_path)
    paths = [tmp_path / f"layer-0000{index}.safetensors" for index in (0, 1)]
    paths[0].rename(tmp_path / "kept")
    paths[1].rename(paths[0])
    (tmp_path / "kept").rename(paths[1])
    store = StatisticsStore.open(tmp_path)
    with pytest.raises(ValueError, match=r"layer-00000.*: holds layers\.1, but is in"):
        store.load(0, "layers.0")


@pytest.mark.parametrize("key", ["fit.num_tokens", "heldout.cosine_distance", "name"])
def test_edited_metadata_are_refused(tmp_path: Path, key: str) -> None:
    store = StatisticsStore.create(tmp_path, ORIGIN)
    store.save(0, "layer", moments(), moments(1))
    path = tmp_path / "layer-00000.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {key: "19"}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ValueError, match=r"layer-00000.*: has been changed .* Delete"):
        store.load(0, "layer")


def test_other_windows_are_refused(tmp_path: Path) -> None:
    store = StatisticsStore.create(tmp_path, of(some_windows()))
    store.save_windows(some_windows(first=1))
    with pytest.raises(ValueError, match=r"heldout_windows\.safetensors: has been cha"):
        store.windows()
    with pytest.raises(ValueError, match="taken with windows_digest"):
        StatisticsStore.create(tmp_path, of(some_windows(first=1)))


def test_version_2_loads_as_it_was_written(tmp_path: Path) -> None:
    fit, heldout = moments(0), moments(1)
    store = StatisticsStore.create(tmp_path, of(some_windows()))
    store.save(0, "layer", fit, heldout)
    store.save_windows(some_windows())
    make_version_2(tmp_path)
    assert StatisticsStore.version_in(tmp_path) == 2
    store = StatisticsStore.create(tmp_path, ORIGIN)  # which goes on in version 2
    store.save(1, "another", fit, heldout)
    for index, name in ((0, "layer"), (1, "another")):
        back_fit, back_heldout = store.load(index, name)
        assert back_heldout is not None
        assert_same(back_fit.residual, fit.residual)
        assert_same(back_heldout.normalized, heldout.normalized)
    assert len(store.windows()) == 12


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield a file's content with one bit flipped, or truncated."""
    for bit in range(0, 8 * len(content), 29):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    for length in range(0, len(content), 97):
        yield content[:length]


def read_all(folder: Path) -> tuple[Any, ...]:
    store = StatisticsStore.open(folder)
    fit, heldout = store.load(0, "layer")
    assert heldout is not None
    return store.origin, fit, heldout, store.windows()


def assert_same_content(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    assert mine[0] == theirs[0]
    for layer, expected in zip(mine[1:3], theirs[1:3], strict=True):
        assert_same(layer.residual, expected.residual)
        assert layer.cosine_distance == expected.cosine_distance
    for window, expected in zip(mine[3], theirs[3], strict=True):
        assert torch.equal(window["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    "file",
    ["statistics.json", "layer-00000.safetensors", "heldout_windows.safetensors"],
)
def test_fuzz_damaged_files_name_themselves_or_change_nothing(
    tmp_path: Path, file: str
) -> None:
    store = StatisticsStore.create(tmp_path, of(some_windows()))
    store.save(0, "layer", moments(0, False), moments(1, False))
    store.save_windows(some_windows())
    expected, path = read_all(tmp_path), tmp_path / file
    messages, tried = [], 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        tried += 1
        try:
            found = read_all(tmp_path)
        except ValueError as err:
            messages.append(str(err))
        else:
            assert_same_content(found, expected)
    assert len(messages) > 0.9 * tried
    for message in messages:
        # a manifest that is well-formed is told apart by the layers beside it
        assert str(tmp_path) in message
        assert "Calibrate again" in message or "Delete the file" in message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "1", '"x"', "{}", '{"format_version": 3}', '{"model": 1}', "{"]
    + ['{"format_version": 3, "model": null, "unknown": 1}'],
)
def test_hostile_manifests_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(ValueError, match=r"statistics .*Calibrate again into another"):
        StatisticsStore.open(tmp_path)


def test_hostile_layers_without_digest_are_named(tmp_path: Path) -> None:
    """Version 2 with any one thing missing, of another width or of another dtype."""
    store = StatisticsStore.create(tmp_path, ORIGIN)
    store.save(0, "layer", moments(0), moments(1))
    make_version_2(tmp_path)
    store = StatisticsStore.open(tmp_path)
    path = tmp_path / "layer-00000.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def refused(tensors: Any, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"layer-00000.*: .* Delete the file"):
            store.load(0, "layer")

    def but(entries: dict[str, Any], name: str, *value: Any) -> dict[str, Any]:
        others = {key: entry for key, entry in entries.items() if key != name}
        return others | ({name: value[0]} if value else {})

    for name in metadata.keys() - {"format_version", "heldout.num_tokens"}:
        refused(tensors, but(metadata, name))
    for name in ("fit.num_tokens", "fit.cosine_distance", "origin"):
        refused(tensors, but(metadata, name, "x"))
    for name, tensor in tensors.items():
        if not name.endswith("cov_yy"):  # which may be missing
            refused(but(tensors, name), metadata)
        refused(but(tensors, name, tensor[:-1].clone()), metadata)
        refused(but(tensors, name, tensor.float()), metadata)
    refused({}, metadata)
