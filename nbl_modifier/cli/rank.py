# SPDX-License-Identifier: Apache-2.0
"""``nbl rank``: measure the layers and rank them, change nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import path
from .processes import part_of, process_group, rank, share_of
from .sources import add_data_arguments
from .statistics import add_statistics_arguments, needs_data, take_over_old_name

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from nbl_modifier.llmcompressor_plugin.ranking import RankingModifier
    from nbl_modifier.records.compression import NBLReport

_DESCRIPTION = """\
Measure how linear each layer is and rank them. The model is left as it is. Prints the
ranking, writes it as JSON and as a plot. With --statistics, nbl compress --statistics
then tries any number of layers, criterion or budget in seconds.
"""
_EPILOG = """\
example:
  nbl rank meta-llama/Llama-3.1-8B --dataset c4 --statistics stats
  nbl rank meta-llama/Llama-3.1-8B --statistics stats --criterion nmse
"""


def add_parser(commands: Any) -> None:
    """
    Add the command to the parser's subcommands.

    :param commands: what ``ArgumentParser.add_subparsers`` returned
    """
    from nbl_modifier.criteria import CRITERIA

    criteria = tuple(CRITERIA)
    parser = commands.add_parser(
        "rank",
        help="measure and rank the layers, change nothing",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", type=path, metavar="MODEL", help="directory or Hugging Face name")
    add(
        "--output",
        type=path,
        default="nbl_ranking",
        metavar="DIR",
        help="folder for nbl_ranking.json and nbl_ranking.png (default: nbl_ranking)",
    )
    add(
        "--criterion",
        choices=criteria,
        default=criteria[0],
        help=f"what to rank by (default: {criteria[0]})",
    )
    add(
        "--kind",
        choices=["attention", "block"],
        default="attention",
        help="what would be replaced (default: attention)",
    )
    add(
        "--input",
        choices=["residual", "normalized"],
        default="residual",
        help="what the linear layers would read (default: residual)",
    )
    add(
        "--canonical-correlations",
        action="store_true",
        help="write quantiles of those of each layer, too, which takes an SVD per "
        "layer; nbl report draws them",
    )
    group = parser.add_argument_group("calibration")
    add_data_arguments(group)
    add_statistics_arguments(group)


def run(args: argparse.Namespace) -> None:
    """
    Run the command.

    :param args: parsed by the parser of ``add_parser``
    :raises ValueError: on bad input, before the model is loaded
    """
    from .logs import show_ours_and_warnings
    from .results import write_plot
    from .sources import (
        calibration_rows,
        load_tokenizer,
        refuse_idle_data_options,
        sequence_length,
    )

    with process_group():
        from .checks import check_model, make_folder

        if not args.debug:
            show_ours_and_warnings()
        take_over_old_name(args)
        folder = make_folder(args.output)
        config = check_model(args.model, linearize=True)
        modifier = _modifier(args)
        calibrates = needs_data(args, modifier, config)
        refuse_idle_data_options(args, calibrates)
        tokenizer = load_tokenizer(args.model)
        rows = None
        if calibrates:
            length = sequence_length(args, config)
            rows = part_of(calibration_rows(args, tokenizer, length))
        ranking = _measure(args, modifier, tokenizer, rows)
        if rank() > 0:
            return
        _write(ranking, folder)
        write_plot(ranking, str(folder))


def _modifier(args: argparse.Namespace) -> RankingModifier:
    from nbl_modifier.llmcompressor_plugin.ranking import RankingModifier

    return RankingModifier(
        criterion=args.criterion,
        kind=args.kind,
        input=args.input,
        canonical_correlations=args.canonical_correlations,
        statistics=args.statistics,
    )


def _measure(
    args: argparse.Namespace,
    modifier: RankingModifier,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | None,
) -> NBLReport:
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from nbl_modifier.evaluation.texts import is_packed

    torch.manual_seed(args.seed)
    processor: Any = tokenizer  # what oneshot expects, annotated narrower
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"),
        processor=processor,
        dataset=rows,
        recipe=modifier,
        num_calibration_samples=share_of(args.num_samples, len(rows or ())),
        shuffle_calibration_samples=not is_packed(args.dataset),
        batch_size=args.batch_size,
        pipeline=args.pipeline,
    )
    return modifier.ranking


def _write(ranking: NBLReport, folder: Path) -> None:
    from nbl_modifier.records.compression import RANKING_FILE_NAME
    from nbl_modifier.report.tables import ranking_table

    print()
    print(ranking_table(ranking), end="\n\n")
    ranking.save(folder / RANKING_FILE_NAME)
    print(f"written: {folder / RANKING_FILE_NAME}")
