# SPDX-License-Identifier: Apache-2.0
"""What is decided about model and output directory before anything expensive."""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

# Tokens in a row that two texts have in common only if one is from the other.
_PIECE = 32


def check_model(model: str, linearize: bool) -> PretrainedConfig:
    """
    Return the model's config if it can be compressed.

    :param model: directory or Hugging Face name
    :param linearize: whether the recipe replaces attention layers
    :raises ValueError: if it cannot be loaded
    :raises NotImplementedError: if its architecture is not supported
    """
    from transformers import AutoConfig

    import nbl_modifier.hf
    from nbl_modifier.architectures import architecture_of

    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model {model}: the directory has no config.json. Pass a directory saved "
            "by transformers, or a Hugging Face name."
        )
    if not path.exists() and model.startswith((".", "/", "~")):
        raise ValueError(f"model {model}: no such directory. Check the path.")
    nbl_modifier.hf.register()
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        raise ValueError(
            f"model {model}: cannot be loaded. Check the path or name. "
            f"({first_line(err)})"
        ) from err
    if linearize:
        architecture_of(config.model_type)
    return config


def check_output(output: str, model: str, overwrite: bool) -> None:
    """
    Refuse a directory that cannot be written or holds something else.

    :param output: directory to be
    :param model: model that is compressed, never overwritten
    :param overwrite: whether an existing checkpoint may be replaced
    :raises ValueError: if it is not writable, or not empty
    """
    from nbl_modifier.hf.directories import recover

    path = Path(output)
    if path.exists() and Path(model).exists() and path.samefile(model):
        raise ValueError(
            f"--output {output}: is the model itself. Choose another directory."
        )
    check_writable(path)
    recover(path)
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / "config.json").is_file():
        raise ValueError(
            f"--output {output}: not empty, and no checkpoint. Choose an empty or new "
            "directory."
        )
    if not overwrite:
        raise ValueError(
            f"--output {output}: holds a checkpoint already. Choose another directory, "
            "or pass --overwrite to replace it."
        )


def check_writable(path: Path) -> None:
    """
    Try to write in the nearest directory that exists; leaves nothing behind.

    :param path: the command line's --output
    :raises ValueError: if it is not writable
    """
    parent = path
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as err:
        raise ValueError(
            f"--output {path}: cannot write in {parent} ({err.strerror}). Choose "
            "another directory."
        ) from err


def check_heldout(source: str, calibration: Dataset, heldout: Dataset) -> str | None:
    """
    Refuse held-out text that is calibrated on.

    :param source: the command line's --heldout
    :param calibration: rows of all processes
    :param heldout: rows to measure perplexity on
    :return: what to say of it where only some of it is
    :raises ValueError: if half of its windows or more are in the calibration text
    """
    piece = min(_PIECE, *map(len, heldout["input_ids"]))
    windows = [list(_pieces(ids, piece, piece)) for ids in heldout["input_ids"]]
    wanted = set(itertools.chain(*windows))
    seen: set[bytes] = set()
    for ids in calibration["input_ids"]:
        seen |= wanted.intersection(_pieces(ids, piece, 1))
    shared = sum(2 * len(seen.intersection(each)) > len(each) for each in windows)
    if not shared:
        return None
    found = (
        f"--heldout {source}: {shared} of its {len(windows)} windows are in the "
        "calibration text"
    )
    if 2 * shared >= len(windows):
        raise ValueError(
            f"{found}, so perplexity on them would not say how the model does on other "
            "text. Pass other text, or 'none'."
        )
    return f"{found}, so perplexity on them is too low"


def _pieces(ids: Sequence[int], length: int, step: int) -> Iterator[bytes]:
    """Yield runs of ``length`` tokens that begin every ``step`` tokens."""
    numbers = array("q", ids)
    content, size = numbers.tobytes(), numbers.itemsize
    for start in range(0, len(ids) - length + 1, step):
        yield content[size * start : size * (start + length)]


def make_folder(output: str) -> Path:
    """
    Make the output folder now rather than fail when everything is measured.

    :param output: the command line's --output
    :raises ValueError: if it cannot be made, or written in
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ValueError(
            f"--output {output}: cannot be made ({err.strerror}). Choose another."
        ) from err
    check_writable(folder)
    return folder


def require_vllm() -> None:
    """
    Check that vLLM is installed here.

    :raises ImportError: if it is not
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed here. Run this in the environment that serves: "
            "pip install vllm nbl-modifier."
        )
