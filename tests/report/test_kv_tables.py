# SPDX-License-Identifier: Apache-2.0
"""The KV cache over context and batch, against arithmetic by hand."""

import json
from pathlib import Path

from nbl_modifier.report.blocks import Text
from nbl_modifier.report.collect import ModelGroup, collect
from nbl_modifier.report.kv_tables import kv_cache_section
from nbl_modifier.report.table import Table
from tests.report.report_factory import write_checkpoint


def group_of(folder: Path) -> ModelGroup:
    (group,) = collect([folder])
    return group


def test_sizes_are_layers_times_tokens(tmp_path: Path) -> None:
    """Keys and values: 2 x 2 heads x 64 x 2 bytes, 512 per layer and token."""
    write_checkpoint(tmp_path / "nbl2", [0, 2])
    table, text = kv_cache_section(group_of(tmp_path))
    assert isinstance(table, Table)
    # of 4 layers, 1/8 is none and 2/8 is m = 1; m = 2 is there already
    assert table.header == ("batch", "context", "base", "nbl2", "m = 1")
    assert table.rows[0] == ("1", "512", "1 MiB", "512 KiB", "768 KiB")
    assert table.rows[-1] == ("64", "1,024", "128 MiB", "64 MiB", "96 MiB")
    assert {row[1] for row in table.rows} == {"512", "1,024"}  # the model's limit
    assert isinstance(text, Text)
    assert "(K − m) / K" in text.text


def test_a_checkpoint_without_configuration_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    write_checkpoint(tmp_path / "b", [0, 2])
    (tmp_path / "a" / "config.json").unlink()
    absent, table, _ = kv_cache_section(group_of(tmp_path))
    assert isinstance(absent, Text)
    assert absent.is_absence
    assert "`a`: has no config.json" in absent.text
    assert isinstance(table, Table)
    assert table.header[:4] == ("batch", "context", "base", "b")


def test_sliding_windows_are_explained(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "nbl", [2])
    path = tmp_path / "nbl" / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 128,
    }
    path.write_text(json.dumps(config))
    table, text = kv_cache_section(group_of(tmp_path))
    assert isinstance(table, Table)
    assert table.header == ("batch", "context", "base", "nbl")
    assert isinstance(text, Text)
    assert "Layers of several kinds" in text.text
