# SPDX-License-Identifier: Apache-2.0
"""Named datasets go to llm-compressor as they are; the rest is packed here."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmcompressor.datasets.utils as host
import pytest
from datasets import Dataset
from transformers import AutoConfig

from nbl_modifier.cli import build_parser
from nbl_modifier.cli.sources import (
    calibration_rows,
    heldout_rows,
    load_tokenizer,
    sequence_length,
)

MODEL = str(Path(__file__).parents[2] / "examples" / "models" / "pycode-4m")


def arguments(*options: str) -> Namespace:
    """Return a parsed command line."""
    required = ["--recipe", "r.yaml", "--output", "out"]
    return build_parser().parse_args(["compress", MODEL, *required, *options])


def test_name_and_options_reach_llm_compressor(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(MODEL)
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    seen: list[Any] = []

    def load(dataset_args: Any, processor: Any) -> Dataset:
        seen.extend([dataset_args, processor])
        return rows

    monkeypatch.setattr(host, "get_processed_dataset", load)
    options = [
        "--dataset",
        "open_platypus",
        "--dataset-config",
        "en",
        "--split",
        "train[:1%]",
    ]
    args = arguments(*options, "--text-column", "body", "--num-samples", "7")
    assert calibration_rows(args, tokenizer, 128) is rows
    given, processor = seen
    assert processor is tokenizer
    assert given.dataset == "open_platypus"
    assert given.dataset_config_name == "en"
    assert given.splits == "train[:1%]"
    assert given.text_column == "body"
    assert given.max_seq_length == 128
    assert given.num_calibration_samples == 7
    assert given.concatenate_data is False
    calibration_rows(
        arguments("--dataset", "open_platypus", "--concatenate-data"), tokenizer, 128
    )
    assert seen[2].concatenate_data is True


@pytest.mark.parametrize("name", ["c4", "wikitext"])
def test_text_of_the_hub_says_what_is_missing(name: str) -> None:
    """Tests run without the hub, so this is what a user without network sees."""
    with pytest.raises(
        ValueError, match=f"--dataset {name}: .*cannot be read from the"
    ):
        calibration_rows(arguments("--dataset", name), load_tokenizer(MODEL), 128)


def test_empty_named_dataset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Dataset.from_dict({"input_ids": []})
    monkeypatch.setattr(host, "get_processed_dataset", lambda *args: empty)
    with pytest.raises(ValueError, match=r"--dataset open_platypus: is empty.*--split"):
        calibration_rows(
            arguments("--dataset", "open_platypus"), load_tokenizer(MODEL), 128
        )


def test_unreachable_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> Dataset:
        raise ConnectionError("no network\nmany lines\n")

    monkeypatch.setattr(host, "get_processed_dataset", load)
    with pytest.raises(ValueError, match=r"--dataset open_platypus: .*\(no network\)$"):
        calibration_rows(
            arguments("--dataset", "open_platypus"), load_tokenizer(MODEL), 128
        )


def test_default_is_the_standard_library() -> None:
    tokenizer = load_tokenizer(MODEL)
    args = arguments("--num-samples", "3", "--heldout-samples", "2")
    calibration = calibration_rows(args, tokenizer, 64)
    heldout = heldout_rows(args, tokenizer, 64, calibrates=True)
    assert heldout is not None
    assert (len(calibration), len(heldout)) == (3, 2)
    # both start with a document, and a document with BOS
    assert calibration[0]["input_ids"][0] == tokenizer.bos_token_id
    assert heldout[0]["input_ids"][0] == tokenizer.bos_token_id


def test_seed_draws_other_calibration_text() -> None:
    tokenizer = load_tokenizer(MODEL)
    first = calibration_rows(arguments("--num-samples", "2"), tokenizer, 64)
    args = arguments("--num-samples", "2", "--seed", "1")
    assert first[:] != calibration_rows(args, tokenizer, 64)[:]


@pytest.mark.parametrize(
    ("options", "calibrates", "expected"),
    [
        ([], True, True),
        ([], False, True),
        (["--heldout", "none"], True, False),
        (["--dataset", "open_platypus"], True, False),
        (["--dataset", "open_platypus", "--heldout", "stdlib"], True, True),
        (["--statistics", "s"], True, True),
        (["--statistics", "s"], False, False),
        (["--statistics", "s", "--heldout", "stdlib"], False, True),
    ],
)
def test_when_there_is_held_out_text(
    options: list[str], calibrates: bool, expected: bool
) -> None:
    rows = heldout_rows(arguments(*options), load_tokenizer(MODEL), 64, calibrates)
    assert (rows is not None) == expected


@pytest.mark.parametrize(
    ("limit", "options", "expected"),
    [
        (131072, [], 2048),
        (1024, [], 1024),
        (None, [], 2048),
        (1024, ["--max-seq-length", "512"], 512),
        (None, ["--max-seq-length", "4096"], 4096),
    ],
)
def test_sequence_length(limit: int | None, options: list[str], expected: int) -> None:
    config: Any = SimpleNamespace(max_position_embeddings=limit)
    assert sequence_length(arguments(*options), config) == expected


def test_model_without_tokenizer_is_named(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(MODEL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))
