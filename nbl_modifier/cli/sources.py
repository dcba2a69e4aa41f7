# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers and token rows that a command was asked to use."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import first_line, path, positive, refuse_idle, seed, text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_MAX_DEFAULT_SEQ_LENGTH = 2048
# Options that are of calibration data, and those of any text.
_OF_DATA = ("dataset", "dataset_config", "split", "concatenate_data", "num_samples")
_OF_TEXT = ("text_column", "max_seq_length", "batch_size")


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that :func:`calibration_rows` reads."""

    def add_number(name: str, default: int | None, meaning: str) -> None:
        group.add_argument(
            name, type=positive, default=default, metavar="N", help=meaning
        )

    group.add_argument(
        "--dataset",
        type=path,
        default="stdlib",
        metavar="SOURCE",
        help="'stdlib' (source code of this Python's standard library; default), a "
        "text file, a .json, .jsonl, .csv or .parquet table, a folder of these, 'c4' "
        "or 'wikitext' from the hub, each packed into full sequences; or another "
        "dataset name for llm-compressor",
    )
    for name, meaning in {
        "--dataset-config": "configuration of a named dataset",
        "--split": "split of a named dataset, as in train[:5%%]",
        "--text-column": "column that holds the text (default: text)",
    }.items():
        default = "text" if name == "--text-column" else None
        group.add_argument(
            name, type=text, default=default, metavar="NAME", help=meaning
        )
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
        type=seed,
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


def asks_for_data(args: argparse.Namespace) -> bool:
    """
    Return whether an option was given that only calibration data can be meant by.

    :param args: the command line, of ``nbl compress`` or ``nbl rank``
    """
    measures = getattr(args, "heldout", None) not in (None, "none")
    names = _OF_DATA if measures else (*_OF_DATA, *_OF_TEXT)
    return not args.given.isdisjoint(names)


def refuse_idle_data_options(args: argparse.Namespace, calibrates: bool) -> None:
    """
    Refuse options about data that have no effect on this run.

    :param args: the command line, of ``nbl compress`` or ``nbl rank``
    :param calibrates: whether the run needs calibration data
    :raises ValueError: naming the option
    """
    from nbl_modifier.evaluation.texts import HUB_TEXTS, is_local

    heldout = heldout_source(args, calibrates)
    of_names = ("dataset_config", "split")
    if not calibrates:
        names = _OF_DATA if heldout else (*_OF_DATA, *_OF_TEXT)
        refuse_idle(args, names, "where no calibration data are needed")
    why = f"with --dataset {args.dataset}"
    if is_local(args.dataset):
        refuse_idle(args, of_names, f"{why}, which is no dataset of the hub")
    if is_local(args.dataset) or args.dataset in HUB_TEXTS:
        refuse_idle(
            args, ["concatenate_data"], f"{why}, which is always packed into sequences"
        )
    sources = [args.dataset] if calibrates else []
    sources += [heldout or args.dataset]
    if not any(map(_may_have_columns, sources)):
        refuse_idle(args, ["text_column"], f"{why}, which has no columns to choose")
    if heldout is None:
        refuse_idle(args, ["heldout_samples"], "without --heldout text")


def _may_have_columns(source: str) -> bool:
    from nbl_modifier.evaluation.texts import HUB_TEXTS, STDLIB, is_local, is_table

    if not is_local(source):
        return source not in HUB_TEXTS
    return source != STDLIB and (Path(source).is_dir() or is_table(source))


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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        raise ValueError(
            f"model {model}: has no tokenizer that can be loaded. Add its tokenizer "
            f"files. ({first_line(err)})"
        ) from err


def load_model(model: str) -> PreTrainedModel:
    """
    Return a model, linearized or not, in its own dtype, on the accelerator if any.

    :param model: directory or Hugging Face name
    :raises ValueError: if its weights are damaged
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import nbl_modifier.hf

    nbl_modifier.hf.register()
    device_map = "auto" if torch.accelerator.is_available() else None
    try:
        return AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", device_map=device_map
        )
    except SafetensorError as err:
        raise ValueError(
            f"model {model}: its weights cannot be read ({first_line(err)}). Copy or "
            "make it again."
        ) from err


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
    from nbl_modifier.evaluation.token_windows import calibration_windows

    with _naming("--dataset", args.dataset):
        texts = _calibration_texts(args)
        if texts is not None:
            return calibration_windows(
                texts, tokenizer, seq_length, args.num_samples, args.seed
            )
    rows = _named_dataset(args, tokenizer, seq_length)
    if len(rows) == 0:
        raise ValueError(
            f"--dataset {args.dataset}: is empty. Pass another --split or dataset."
        )
    return rows


@contextlib.contextmanager
def _naming(option: str, source: str) -> Iterator[None]:
    """Have errors about a source say which option named it."""
    try:
        yield
    except (ValueError, OSError) as err:
        kind = FileNotFoundError if isinstance(err, FileNotFoundError) else ValueError
        said = str(err).removeprefix(f"dataset {source}: ")
        raise kind(f"{option} {source}: {said}") from err


def _calibration_texts(args: argparse.Namespace) -> Iterable[str] | None:
    """Return documents to pack, or None if llm-compressor is to make the rows."""
    from nbl_modifier.evaluation.texts import HUB_TEXTS, hub_texts, is_local, load_texts

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
        raise ValueError(
            f"--dataset {args.dataset}: llm-compressor cannot load it. Check the "
            "network, --dataset-config, --split and --text-column. "
            f"({first_line(err)})"
        ) from err


def heldout_source(args: argparse.Namespace, calibrates: bool) -> str | None:
    """
    Return what perplexity is measured on, or None if it is not.

    :param args: the command line; that of ``nbl rank`` has no such option
    :param calibrates: whether the run needs calibration data
    """
    from nbl_modifier.evaluation.texts import STDLIB

    source: str | None = getattr(args, "heldout", "none")
    if source is None:
        # With statistics alone, perplexity would take nearly all the time there is.
        quick = args.statistics is not None and not calibrates
        source = STDLIB if args.dataset == STDLIB and not quick else "none"
    return None if source == "none" else source


def heldout_rows(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    calibrates: bool,
) -> Dataset | None:
    """
    Return held-out token windows, or None if there is to be no perplexity.

    :param args: the command line
    :param tokenizer: the model's
    :param seq_length: tokens per window
    :param calibrates: whether the run needs calibration data
    :raises ValueError: if there are none; the message names the option
    :raises FileNotFoundError: if a file does not exist
    """
    from nbl_modifier.evaluation.texts import STDLIB, is_local, load_texts
    from nbl_modifier.evaluation.token_windows import pack

    source = heldout_source(args, calibrates)
    if source is None:
        return None
    if not is_local(source):
        raise ValueError(
            f"--heldout {source}: no such file or folder. Pass '{STDLIB}', a text "
            "file, a folder of text files, or 'none'."
        )
    with _naming("--heldout", source):
        texts = load_texts(source, "heldout", args.text_column)
        return pack(texts, tokenizer, seq_length, args.heldout_samples)
