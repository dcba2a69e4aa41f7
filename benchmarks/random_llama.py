# SPDX-License-Identifier: Apache-2.0
"""The command line of scripts that time a random Llama, and its config."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig

__all__ = ["adding", "llama_config"]

_SHAPE = {
    "hidden_size": "d",
    "intermediate_size": "width of the MLP",
    "layers": "decoder layers",
    "heads": "attention heads",
    "kv_heads": "key-value heads",
    "vocab_size": "rows of the embedding",
}


def adding(
    parser: argparse.ArgumentParser, **shape: int
) -> Callable[[str, Any, str], None]:
    """
    Add the options of a shape; return what adds another: name, default, text of help.

    :param parser: of the command line
    :param shape: default of each: ``hidden_size``, ``intermediate_size``, ``layers``,
        ``heads``, ``kv_heads``, ``vocab_size``
    """

    def add(name: str, default: Any, text: str) -> None:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{text} ({default})"
        )

    for name, text in _SHAPE.items():
        add(f"--{name.replace('_', '-')}", shape[name], text)
    return add


def llama_config(args: argparse.Namespace) -> LlamaConfig:
    """
    Return the config of the model.

    :param args: the command line, with ``length``: tokens per sequence
    """
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(2048, args.length),
    )
