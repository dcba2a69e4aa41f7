# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers and token rows that a command was asked to use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import Dataset
    from llmcompressor.recipe import Recipe
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_MAX_DEFAULT_SEQ_LENGTH = 2048


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that :func:`calibration_rows` reads."""

    def add_number(name: str, default: int | None, text: str) -> None:
        group.add_argument(name, type=positive, default=default, metavar="N", help=text)

    group.add_argument(
        "--dataset",
        default="stdlib",
        metavar="SOURCE",
        help="'stdlib' (source code of this Python's standard library; default), a "
        "text file, a .json, .jsonl, .csv or .parquet table, a folder of these, 'c4' "
        "or 'wikitext' from the hub, each packed into full sequences; or another "
        "dataset name for llm-compressor",
    )
    for name, text in {
        "--dataset-config": "configuration of a named dataset",
        "--split": "split of a named dataset, as in train[:5%%]",
        "--text-column": "column that holds the text (default: text)",
    }.items():
        default = "text" if name == "--text-column" else None
        group.add_argument(name, default=default, metavar="NAME", help=text)
    group.add_argument(
        "--concatenate-data",
        action="store_true",
        help="join the rows of llm-compressor's dataset into full sequences",
    )
    add_number("--num-samples", 256, "calibration sequences (default: 256)")
    add_number(
        "--max-seq-length",
        None,
        "tokens per sequence (default: 2048, or the model's limit if lower)",
    )
    add_number("--batch-size", 1, "sequences per forward pass (default: 1)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which of the text, in which order (default: 0)",
    )
    group.add_argument(
        "--pipeline",
        default="independent",
        choices=["independent", "sequential", "basic", "datafree"],
        help="as in llm-compressor (default: independent, one epoch per modifier)",
    )


def add_statistics_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that :func:`use_statistics` reads."""
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--save-statistics",
        metavar="DIR",
        help="keep the statistics of every layer there; an interrupted calibration "
        "goes on where it stopped",
    )
    either.add_argument(
        "--statistics",
        metavar="DIR",
        help="use those of an earlier run instead of calibrating",
    )


def use_statistics(args: argparse.Namespace, recipe: Recipe) -> bool:
    """
    Hand ``--statistics`` or ``--save-statistics`` to the recipe's NBLModifier.

    :param args: the command line
    :param recipe: changed in place
    :return: whether the recipe still needs calibration data
    :raises ValueError: if there is no NBLModifier to use them
    """
    from nbl_modifier.modifier import NBLModifier

    needs_data = False
    for modifier in recipe.modifiers:
        if not isinstance(modifier, NBLModifier):
            needs_data |= modifier.requires_calibration_data
            continue
        if args.statistics or args.save_statistics:
            modifier.statistics = args.statistics
            modifier.save_statistics = args.save_statistics
        needs_data |= modifier.statistics is None or modifier.runs_again
    asked = args.statistics or args.save_statistics
    if asked and not any(isinstance(each, NBLModifier) for each in recipe.modifiers):
        raise ValueError(
            f"--statistics, --save-statistics {asked}: the recipe has no NBLModifier, "
            "which they are of. Leave the option out."
        )
    return needs_data


def positive(text: str) -> int:
    """Return an option's value as a number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def sequence_length(args: argparse.Namespace, config: PretrainedConfig) -> int:
    """
    Return tokens per sequence: what was asked for, or 2048 if the model has as many.

    :param args: the command line
    :param config: the model's
    :raises ValueError: if more were asked for than the model has positions
    """
    limit = getattr(config, "max_position_embeddings", None)
    wanted = args.max_seq_length
    if wanted is None:
        return min(_MAX_DEFAULT_SEQ_LENGTH, limit or _MAX_DEFAULT_SEQ_LENGTH)
    if limit is not None and wanted > limit:
        raise ValueError(
            f"--max-seq-length {wanted}: {args.model} has {limit} positions. Pass "
            f"{limit} or less."
        )
    return wanted


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """
    Return the model's tokenizer.

    :param model: directory or Hugging Face name
    :raises ValueError: if there is none
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ValueError(
            f"model {model}: has no tokenizer that can be loaded. Add its tokenizer "
            f"files. ({reason})"
        ) from err


def load_model(model: str) -> PreTrainedModel:
    """
    Return a model, linearized or not, in its own dtype, on the accelerator if any.

    :param model: directory or Hugging Face name
    """
    import torch
    from transformers import AutoModelForCausalLM

    import nbl_modifier.hf

    nbl_modifier.hf.register()
    device_map = "auto" if torch.accelerator.is_available() else None
    return AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map=device_map
    )


def calibration_rows(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Dataset:
    """
    Return tokenized calibration rows, at least one.

    :param args: the command line
    :param tokenizer: the model's
    :param seq_length: tokens per row; at most that many for a dataset that
        llm-compressor prepares, unless --concatenate-data joins them
    :raises ValueError: if there are none; the message names the option
    :raises FileNotFoundError: if a file does not exist
    """
    from nbl_modifier.data import calibration_windows

    texts = _calibration_texts(args)
    if texts is not None:
        try:
            return calibration_windows(
                texts, tokenizer, seq_length, args.num_samples, args.seed
            )
        except ValueError as err:
            raise ValueError(f"--dataset {args.dataset}: {err}") from err
    rows = _named_dataset(args, tokenizer, seq_length)
    if len(rows) == 0:
        raise ValueError(
            f"--dataset {args.dataset}: is empty. Pass another --split or dataset."
        )
    return rows


def _calibration_texts(args: argparse.Namespace) -> Iterable[str] | None:
    """Return documents to pack, or None if llm-compressor is to make the rows."""
    from nbl_modifier.data import HUB_TEXTS, hub_texts, is_local, load_texts

    if is_local(args.dataset):
        return load_texts(args.dataset, "calibration", args.text_column, args.seed)
    if args.dataset in HUB_TEXTS:
        return hub_texts(args.dataset, args.dataset_config, args.split, args.seed)
    return None


def _named_dataset(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Dataset:
    """Let llm-compressor resolve the name, as ``oneshot(dataset=name)`` would."""
    from llmcompressor.args import DatasetArguments
    from llmcompressor.datasets.utils import get_processed_dataset

    arguments = DatasetArguments(
        dataset=args.dataset,
        dataset_config_name=args.dataset_config,
        splits=args.split,
        text_column=args.text_column,
        max_seq_length=seq_length,
        concatenate_data=args.concatenate_data,
        num_calibration_samples=args.num_samples,
    )
    processor: Any = tokenizer  # what llm-compressor expects, annotated narrower
    try:
        return get_processed_dataset(arguments, processor)
    except KeyError as err:
        from llmcompressor.transformers.data import TextGenerationDataset

        names = ", ".join(sorted(TextGenerationDataset.registered_names()))
        raise ValueError(
            f"--dataset {args.dataset}: no such file, and no dataset that "
            f"llm-compressor knows by name. It knows {names}."
        ) from err
    except (OSError, ValueError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ValueError(
            f"--dataset {args.dataset}: llm-compressor cannot load it. Check the "
            f"network, --dataset-config, --split and --text-column. ({reason})"
        ) from err


def heldout_rows(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Dataset | None:
    """
    Return held-out token windows, or None if there is to be no perplexity.

    :param args: the command line
    :param tokenizer: the model's
    :param seq_length: tokens per window
    :raises ValueError: if there are none; the message names the option
    :raises FileNotFoundError: if a file does not exist
    """
    from nbl_modifier.data import STDLIB, is_local, load_texts, pack

    source = args.heldout
    if source is None:
        source = STDLIB if args.dataset == STDLIB else "none"
    if source == "none":
        return None
    if not is_local(source):
        raise ValueError(
            f"--heldout {source}: no such file or folder. Pass '{STDLIB}', a text "
            "file, a folder of text files, or 'none'."
        )
    texts = load_texts(source, "heldout", args.text_column)
    try:
        return pack(texts, tokenizer, seq_length, args.heldout_samples)
    except ValueError as err:
        raise ValueError(f"--heldout {source}: {err}") from err
