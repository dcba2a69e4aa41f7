# SPDX-License-Identifier: Apache-2.0
"""The ``nbl_config`` block: what it says, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

import nbl_modifier.hf
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf import configuration_nbl
from nbl_modifier.hf.configuration_nbl import (
    FORMAT_VERSION,
    LinearizedLayer,
    config_class,
    nbl_config_block,
)

LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(autouse=True)
def registered() -> None:
    nbl_modifier.hf.register()


def make_config(**fields: Any) -> Any:
    config: Any = config_class(LLAMA)
    return config(num_hidden_layers=12, hidden_size=32, **fields)


def test_class_is_the_base_models_with_its_own_type() -> None:
    config = make_config()
    assert isinstance(config, LlamaConfig)
    assert type(config).__name__ == "NBLLlamaConfig"
    assert config.model_type == type(config).model_type == "nbl_llama"
    assert config_class(LLAMA) is config_class(LLAMA)
    assert configuration_nbl.NBLLlamaConfig is config_class(LLAMA)


def test_unknown_class_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="NBLGPT2Config"):
        _ = configuration_nbl.NBLGPT2Config


def test_block_names_layers_in_order() -> None:
    block = nbl_config_block(
        {10: LinearizedLayer("residual"), 2: LinearizedLayer("normalized")},
        criterion="nmse",
    )
    assert block["version"] == FORMAT_VERSION
    assert block["criterion"] == "nmse"
    assert list(block["layers"]) == ["2", "10"]
    assert block["layers"]["2"] == {
        "input": "normalized",
        "kind": "attention",
        "method": "linear",
        "rank": None,
    }


def test_round_trip_through_disk(tmp_path: Path) -> None:
    layers = {
        10: LinearizedLayer("residual", rank=16),
        2: LinearizedLayer("normalized"),
        3: LinearizedLayer(method="drop"),
        4: LinearizedLayer(kind="block"),
    }
    make_config(nbl_config=nbl_config_block(layers)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "nbl_llama"
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is config_class(LLAMA)
    assert config.linearized_layers() == layers
    assert list(config.linearized_layers()) == [2, 3, 4, 10]  # as numbers, not as text


def test_registering_twice_is_fine() -> None:
    nbl_modifier.hf.register()
    assert AutoConfig.for_model("nbl_llama").model_type == "nbl_llama"


def test_config_without_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no `nbl_config` block") as error:
        make_config().linearized_layers()
    assert "write it again" in str(error.value)


def test_newer_format_is_refused() -> None:
    block = nbl_config_block({}) | {"version": FORMAT_VERSION + 1}
    with pytest.raises(ValueError, match="newer than") as error:
        make_config(nbl_config=block).linearized_layers()
    assert "pip install -U nbl-modifier" in str(error.value)


@pytest.mark.parametrize("index", [12, -1])
def test_layer_that_does_not_exist_is_refused(index: int) -> None:
    block = nbl_config_block({0: LinearizedLayer("residual")})
    block["layers"][str(index)] = block["layers"]["0"]
    with pytest.raises(ValueError, match=rf"\[{index}\] do not exist") as error:
        make_config(nbl_config=block).linearized_layers()
    assert "0 to 11" in str(error.value)


def with_entry(**fields: Any) -> Any:
    block = nbl_config_block({0: LinearizedLayer("residual")})
    block["layers"]["0"] |= fields
    return make_config(nbl_config=block)


@pytest.mark.parametrize(
    ("field", "value"),
    [("input", "output"), ("kind", "mlp"), ("method", "polynomial")],
)
def test_unknown_kind_of_layer_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of") as error:
        with_entry(**{field: value}).linearized_layers()
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("rank", [0, -1, 0.5, True, "8"])
def test_rank_that_is_no_rank_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="rank must be null or an integer") as error:
        with_entry(rank=rank).linearized_layers()
    assert repr(rank) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "drop", "rank": 8}, "method drop has no rank, got 8"),
        ({"kind": "block", "input": "normalized"}, "kind block reads the residual"),
        ({"kind": "block", "method": "drop"}, "a dropped block has no entry"),
        ({"experts": 4}, "unknown field experts"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        with_entry(**fields).linearized_layers()
    assert "pip install -U nbl-modifier" in str(error.value)


def test_entry_of_the_first_version_is_read() -> None:
    """Written before there were ranks."""
    block = nbl_config_block({3: LinearizedLayer("normalized")})
    del block["layers"]["3"]["rank"]
    layers = make_config(nbl_config=block).linearized_layers()
    assert layers == {3: LinearizedLayer("normalized")}


def test_base_class_is_untouched() -> None:
    assert not hasattr(LlamaConfig(), "nbl_config")
    assert isinstance(make_config(), PreTrainedConfig)
    assert LlamaConfig().model_type == "llama"


ENTRY = {"input": "residual", "kind": "attention", "method": "linear", "rank": None}
HOSTILE_BLOCKS: list[tuple[Any, str]] = [
    ("a text", "must hold fields, got 'a text'"),
    ([], "must hold fields"),
    (7, "must hold fields"),
    ({}, "version must be an integer >= 1, got None"),
    ({"layers": {}}, "version must be an integer >= 1, got None"),
    ({"version": "1", "layers": {}}, "version must be .* got '1'"),
    ({"version": True, "layers": {}}, "version must be .* got True"),
    ({"version": 0, "layers": {}}, "version must be .* got 0"),
    ({"version": 1}, "layers must hold a description by layer number, got None"),
    ({"version": 1, "layers": [0]}, "layers must hold"),
    ({"version": 1, "layers": {"first": ENTRY}}, "layers must hold .*first"),
    ({"version": 1, "layers": {"0": ENTRY, "00": ENTRY}}, "layers must hold"),
    ({"version": 1, "layers": {"1" * 5000: ENTRY}}, "layers must hold"),
    ({"version": 1, "layers": {"0": None}}, "described by fields, got None"),
    ({"version": 1, "layers": {"0": "linear"}}, "described by fields, got 'linear'"),
    ({"version": 1, "layers": {"0": ENTRY | {"kind": []}}}, "kind must be one of"),
    ({"version": 1, "layers": {"0": ENTRY | {"rank": 33}}}, "layer 0 has rank 33.* 32"),
]


@pytest.mark.parametrize(("block", "message"), HOSTILE_BLOCKS)
def test_hostile_block_is_named(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_config(nbl_config=block).linearized_layers()
    assert str(error.value).startswith("nbl_config: ")
    assert "pip install -U nbl-modifier" in str(error.value)


def test_rank_of_the_hidden_size_is_read() -> None:
    block = nbl_config_block({0: LinearizedLayer(rank=32)})
    config = make_config(nbl_config=block)
    assert config.linearized_layers()[0].rank == 32
