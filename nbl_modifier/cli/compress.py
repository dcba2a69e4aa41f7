# SPDX-License-Identifier: Apache-2.0
"""``nbl compress``: check everything, calibrate, save, measure, report."""

from __future__ import annotations

import argparse
import contextlib
import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import path, positive
from .processes import part_of, process_group, rank, share_of, world_size
from .sources import add_data_arguments
from .statistics import add_statistics_arguments

if TYPE_CHECKING:
    from datasets import Dataset
    from llmcompressor.recipe import Recipe
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from nbl_modifier.evaluation import PerplexityResult

SAVED = "saved checkpoint"

_DESCRIPTION = """\
Run a recipe on a model with llm-compressor and save a checkpoint. Everything that can
be checked is checked before calibration. Prints the ranking of the layers, perplexity
on held-out text after each modifier, and sizes; writes nbl_report.json, a plot and a
model card beside the weights.
"""
_EPILOG = """\
example:
  nbl compress meta-llama/Llama-3.1-8B --recipe recipes/nbl.yaml --dataset c4 \\
      --heldout my_text.txt --output Llama-3.1-8B-NBL
"""


@dataclass(frozen=True)
class Plan:
    """
    Everything a run needs, checked.

    :param args: the command line
    :param recipe: parsed recipe
    :param has_nbl: whether the recipe replaces attention layers
    :param tokenizer: the model's tokenizer
    :param calibration: tokenized rows, those of this process; None if none are needed
    :param heldout: token windows, or None for no perplexities
    :param note: what is to be known about these, or None
    """

    args: argparse.Namespace
    recipe: Recipe
    has_nbl: bool
    tokenizer: PreTrainedTokenizerBase
    calibration: Dataset | None
    heldout: Dataset | None
    note: str | None = None


def add_parser(commands: Any) -> None:
    """
    Add the command to the parser's subcommands.

    :param commands: what ``ArgumentParser.add_subparsers`` returned
    """
    parser = commands.add_parser(
        "compress",
        help="run a recipe on a model and save a checkpoint vLLM serves",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", type=path, metavar="MODEL", help="directory or Hugging Face name")
    add(
        "--recipe",
        type=path,
        required=True,
        metavar="FILE",
        help="llm-compressor recipe, YAML",
    )
    add(
        "--output",
        type=path,
        required=True,
        metavar="DIR",
        help="directory for the checkpoint",
    )
    add("--overwrite", action="store_true", help="replace the checkpoint in --output")
    group = parser.add_argument_group("calibration")
    add_data_arguments(group)
    add_statistics_arguments(group)
    _add_heldout_arguments(parser.add_argument_group("evaluation"))


def _add_heldout_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--heldout",
        type=path,
        metavar="SOURCE",
        help="text for perplexity: 'stdlib', a file, a folder, or 'none' (default: "
        "'stdlib' with --dataset stdlib, 'none' with another or without calibration "
        "because of --statistics)",
    )
    group.add_argument(
        "--heldout-samples",
        type=positive,
        default=64,
        metavar="N",
        help="held-out sequences (default: 64)",
    )


def run(args: argparse.Namespace) -> None:
    """
    Run the command.

    :param args: parsed by the parser of ``add_parser``
    """
    with process_group():
        plan = prepare(args)
        _announce(plan)
        figures = calibrate(plan)
        if rank() == 0:
            from .results import print_results

            print_results(args.output, args.model, plan.has_nbl, figures)


def _announce(plan: Plan) -> None:
    args, rows = plan.args, plan.calibration
    if rows is None:
        print(f"calibration: {_without_data(plan)}")
    else:
        source = args.dataset
        if source == "stdlib":
            source = f"the standard library of Python {platform.python_version()}"
        count = min(args.num_samples, len(rows) * world_size())
        print(f"calibration: {count} x {len(rows[0]['input_ids'])} tokens of {source}")
        if count < args.num_samples:
            asked = args.num_samples
            print(f"note: {asked} sequences were asked for, there are {count}")
    if plan.note is not None:
        print(f"note: {plan.note}")
    if plan.heldout is None:
        print("note: no perplexities, because there is no --heldout text")


def _without_data(plan: Plan) -> str:
    folders = (getattr(each, "statistics", None) for each in plan.recipe.modifiers)
    found = [folder for folder in folders if folder is not None]
    return f"statistics in {found[0]}" if found else "the recipe needs no data"


def prepare(args: argparse.Namespace) -> Plan:
    """
    Check the command line and load recipe, tokenizer and text; writes nothing.

    :param args: parsed by the parser of ``add_parser``
    :raises ValueError: on bad input; the message says which and what to do
    :raises FileNotFoundError: if a named file does not exist
    :raises NotImplementedError: if the architecture is not supported
    """
    from nbl_modifier.llmcompressor_plugin.recipe_file import load_recipe

    from .checks import check_heldout, check_model, check_output
    from .logs import show_ours_and_warnings
    from .sources import (
        calibration_rows,
        heldout_rows,
        load_tokenizer,
        refuse_idle_data_options,
        sequence_length,
    )
    from .statistics import use_statistics

    check_output(args.output, args.model, args.overwrite)
    if not args.debug:
        show_ours_and_warnings()
    recipe = load_recipe(args.recipe)

    from nbl_modifier.llmcompressor_plugin.modifier import NBLModifier

    has_nbl = any(isinstance(each, NBLModifier) for each in recipe.modifiers)
    config = check_model(args.model, linearize=has_nbl)
    calibrates = use_statistics(args, recipe, config)
    refuse_idle_data_options(args, calibrates)
    seq_length = sequence_length(args, config)
    tokenizer = load_tokenizer(args.model)
    heldout = heldout_rows(args, tokenizer, seq_length, calibrates)
    calibration = note = None
    if calibrates:
        rows = calibration_rows(args, tokenizer, seq_length)
        if heldout is not None:
            note = check_heldout(args.heldout or args.dataset, rows, heldout)
        calibration = part_of(rows)
    return Plan(
        args=args,
        recipe=recipe,
        has_nbl=has_nbl,
        tokenizer=tokenizer,
        calibration=calibration,
        heldout=heldout,
        note=note,
    )


def calibrate(plan: Plan) -> dict[str, PerplexityResult]:
    """
    Run the recipe through llm-compressor, save, and measure what was saved.

    :param plan: from ``prepare``
    :return: perplexities in order: base, after each modifier, the saved checkpoint;
        empty without held-out text
    """
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from nbl_modifier.evaluation import perplexity
    from nbl_modifier.evaluation.texts import is_packed
    from nbl_modifier.llmcompressor_plugin.probe import BASE, with_probes
    from nbl_modifier.numerics.products import FastProducts

    from .sources import load_model

    args = plan.args
    processor: Any = plan.tokenizer  # what oneshot expects, annotated narrower
    products = FastProducts()
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    recipe = plan.recipe
    figures: dict[str, PerplexityResult] = {}
    if plan.heldout is not None:
        measure = functools.partial(
            perplexity, windows=plan.heldout, batch_size=args.batch_size
        )
        if args.pipeline == "independent":
            recipe, figures = with_probes(recipe, measure)
        else:  # one epoch for all modifiers, nothing to measure in between
            figures[BASE] = measure(model)
    count = 0
    if plan.calibration is not None:
        count = share_of(args.num_samples, len(plan.calibration))
    # NBLModifier sees to products as well, if there is one
    with products, _output(plan, model.config) as output:
        oneshot(
            model=model,
            processor=processor,
            dataset=plan.calibration,
            recipe=recipe,
            output_dir=output,
            num_calibration_samples=count,
            # packed windows are shuffled already, and the same for each modifier
            shuffle_calibration_samples=not is_packed(args.dataset),
            batch_size=args.batch_size,
            pipeline=args.pipeline,
        )
    del model
    if plan.heldout is not None and rank() == 0:
        figures[SAVED] = measure(load_model(args.output))
    return figures


@contextlib.contextmanager
def _output(plan: Plan, config: PretrainedConfig) -> Iterator[str]:
    """
    Yield where ``oneshot()`` is to save.

    A linearized model changes the directory as a whole by itself. What llm-compressor
    alone saves would be written over the old files one by one.
    """
    from nbl_modifier.hf.checkpoint import is_of_checkpoint
    from nbl_modifier.hf.configuration_nbl import NBLConfigMixin
    from nbl_modifier.hf.directories import replaced

    linearized = plan.has_nbl or isinstance(config, NBLConfigMixin)
    if linearized or world_size() > 1:
        yield plan.args.output
        return
    with replaced(Path(plan.args.output), is_of_checkpoint) as folder:
        yield str(folder)
