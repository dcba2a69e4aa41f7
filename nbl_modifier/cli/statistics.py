# SPDX-License-Identifier: Apache-2.0
"""Statistics that a command was asked to keep, or to use instead of data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import path

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

    from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier


def add_statistics_arguments(group: argparse._ArgumentGroup) -> None:
    """
    Add the options that :func:`use_statistics` reads.

    :param group: of a command's parser
    """
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--save-statistics",
        type=path,
        metavar="DIR",
        help="keep the statistics of every layer there; an interrupted calibration "
        "goes on where it stopped",
    )
    either.add_argument(
        "--statistics",
        type=path,
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
    from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier

    needs_data = False
    for modifier in recipe.modifiers:
        if not isinstance(modifier, NBLModifier):
            needs_data |= modifier.requires_calibration_data
            continue
        if args.statistics or args.save_statistics:
            _refuse_other_folder(args, modifier)
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


def _refuse_other_folder(args: argparse.Namespace, modifier: NBLModifier) -> None:
    """Refuse a folder of the command line where the recipe names another one."""
    for name in ("statistics", "save_statistics"):
        folder = getattr(modifier, name)
        if folder is not None and folder != getattr(args, name):
            asked = "statistics" if args.statistics else "save_statistics"
            raise ValueError(
                f"--{asked.replace('_', '-')} {getattr(args, asked)}: the recipe has "
                f"NBLModifier.{name}: {folder} already. Remove one of the two."
            )
