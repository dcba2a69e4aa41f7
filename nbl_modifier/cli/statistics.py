# SPDX-License-Identifier: Apache-2.0
"""Statistics that a command keeps in a folder, and uses instead of data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import path
from .sources import asks_for_data

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe
    from transformers import PretrainedConfig

    from nbl_modifier.llmcompressor_plugin.options import Options


def add_statistics_arguments(group: argparse._ArgumentGroup) -> None:
    """
    Add the options that :func:`use_statistics` reads.

    :param group: of a command's parser
    """
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--statistics",
        type=path,
        metavar="DIR",
        help="keep the statistics of every layer there and use those that are there: "
        "an interrupted calibration goes on where it stopped, and where none is "
        "missing, no data are read unless options ask for them",
    )
    # as it was called in 0.1
    either.add_argument("--save-statistics", type=path, help=argparse.SUPPRESS)


def take_over_old_name(args: argparse.Namespace) -> None:
    """
    Read ``--save-statistics`` as ``--statistics``, with a warning.

    :param args: the command line, changed in place
    """
    from loguru import logger

    if args.save_statistics:
        args.statistics = args.save_statistics
        logger.warning(
            "--save-statistics is now --statistics, and the next release refuses the "
            "old name"
        )


def needs_data(
    args: argparse.Namespace, modifier: Options, config: PretrainedConfig
) -> bool:
    """
    Return whether a modifier of ours is to run over calibration data.

    :param args: the command line
    :param modifier: with its folder of statistics, if any
    :param config: the model's
    :raises ValueError: if the statistics, or the layers asked for, cannot be told
    """
    from nbl_modifier.llmcompressor_plugin.plan import needs_data

    # the old name always took them
    asked = args.save_statistics or asks_for_data(args)
    return bool(asked) or needs_data(modifier, config)


def use_statistics(
    args: argparse.Namespace, recipe: Recipe, config: PretrainedConfig
) -> bool:
    """
    Hand ``--statistics`` to the recipe's NBLModifier.

    :param args: the command line
    :param recipe: changed in place
    :param config: the model's
    :return: whether the recipe still needs calibration data
    :raises ValueError: if there is no NBLModifier to use them
    """
    from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier

    take_over_old_name(args)
    folder, needed, has_nbl = args.statistics, False, False
    for modifier in recipe.modifiers:
        if not isinstance(modifier, NBLModifier):
            needed |= modifier.requires_calibration_data
            continue
        has_nbl = True
        if folder and modifier.statistics not in (None, folder):
            raise ValueError(
                f"--statistics {folder}: the recipe has NBLModifier.statistics: "
                f"{modifier.statistics} already. Remove one of the two."
            )
        modifier.statistics = folder or modifier.statistics
        needed |= needs_data(args, modifier, config)
    if folder and not has_nbl:
        raise ValueError(
            f"--statistics {folder}: the recipe has no NBLModifier, which they are of. "
            "Leave the option out."
        )
    return needed
