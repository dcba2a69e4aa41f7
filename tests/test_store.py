# SPDX-License-Identifier: Apache-2.0
"""The folder of statistics: exact, whole or absent, and only of what it says."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from nbl_modifier.capture import LayerMoments, LayerStatistics
from nbl_modifier.numerics import CovarianceStats
from nbl_modifier.store import Origin, StatisticsStore

ORIGIN = Origin("some/model", "0123", "4567", 8, 1, "attention", "normalized")
WIDTH = 6


def moments(seed: int = 0, normalized: bool = True) -> LayerMoments:
    generator = torch.Generator().manual_seed(seed)
    statistics = LayerStatistics("layer", WIDTH, normalized, torch.device("cpu"))
    residual, norm, output = torch.randn(3, 1, 20, WIDTH, generator=generator)
    statistics.update(residual, norm, output, None)
    return statistics.finalize()


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
    back_fit, back_heldout = store.load(3)
    for mine, theirs in ((back_fit, fit), (back_heldout, heldout)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert_same(mine.residual, theirs.residual)
            assert_same(mine.normalized, theirs.normalized)
            assert mine.cosine_distance == theirs.cosine_distance


def test_windows_come_back_in_order(tmp_path: Path) -> None:
    windows = [
        {"input_ids": torch.tensor([[i, 1]]), "attention_mask": torch.ones(1, 2)}
        for i in range(12)
    ]
    store = StatisticsStore.create(tmp_path, ORIGIN)
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

    monkeypatch.setattr("nbl_modifier.store.save_file", full_disk)
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
        store.load(0)


def test_a_layer_of_another_calibration_is_refused(tmp_path: Path) -> None:
    for name, digest in (("one", "1111"), ("two", "2222")):
        store = StatisticsStore.create(
            tmp_path / name, replace(ORIGIN, data_digest=digest)
        )
        store.save(0, "layer", moments(), None)
    file = "layer-00000.safetensors"
    (tmp_path / "one" / file).replace(tmp_path / "two" / file)
    with pytest.raises(ValueError, match="of another calibration than statistics.json"):
        StatisticsStore.open(tmp_path / "two").load(0)


def test_a_folder_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    StatisticsStore.create(tmp_path, ORIGIN)
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3}))
    with pytest.raises(ValueError, match="format_version is 3, this"):
        StatisticsStore.open(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no statistics\.json"):
        StatisticsStore.open(tmp_path)
    with pytest.raises(ValueError, match="nothing was held out"):
        StatisticsStore.create(tmp_path, ORIGIN).windows()
