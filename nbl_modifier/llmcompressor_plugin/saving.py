"""
Saving of linearized models, whatever recipe they went through last.

A recipe with NBLModifier makes a model linearized; a later ``oneshot()`` may quantize
it without any NBLModifier in its recipe. Either way the checkpoint is a linearized one:
whole or not at all, with its report, its model card and the recipes of all runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.distributed import is_source_process
from llmcompressor.core import active_session
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)
from transformers import PreTrainedModel
from transformers.utils import cached_file

from nbl_modifier.architectures import ARCHITECTURES, Architecture
from nbl_modifier.hf import register as register_classes
from nbl_modifier.hf.checkpoint import publish_on_save
from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
from nbl_modifier.replacement.surgery import on_disk
from nbl_modifier.report.model_card import write_report

from .session import running_oneshot
from .upstream import fuse_experts, keep_expert_names, wrap_saving

__all__ = ["publish", "register", "report_of"]

# Of a checkpoint of what is on disk because it does not fit in memory: a file of it is
# in memory, twice, while it is written. transformers' own is 50 GB.
_SHARD_BYTES = 500_000_000
RECIPE_FILE_NAME = "recipe.yaml"
# default_stage, default_stage_1 (llm-compressor's), default_1_stage (ours)
_STAGE_SUFFIX = re.compile(r"(_[0-9]+)?_stage(_[0-9]+)?$")


@dataclasses.dataclass(frozen=True)
class _Record:
    """
    What is known of a linearized model in memory.

    :param report: returns its report, if there is one
    :param stages: stages of the recipes that were run on it since it was loaded, before
        the last one
    """

    report: Callable[[], NBLReport | None]
    stages: tuple[tuple[str, Any], ...] = ()


def _record_of(model: PreTrainedModel) -> _Record | None:
    record: _Record | None = vars(model).get("_nbl_record")
    return record


def _keep_record(model: PreTrainedModel, record: _Record) -> None:
    # On the model and not in a table: the report comes from modifiers, which reference
    # the model, so that an entry of a table would keep the model alive for ever.
    vars(model)["_nbl_record"] = record


def report_of(model: PreTrainedModel) -> NBLReport | None:
    """
    Return the report of a linearized model, in memory or beside its weights.

    :param model: a model of which some layers are linearized
    """
    record = _record_of(model)
    return record.report() if record is not None else _report_on_disk(model)


def publish(
    model: PreTrainedModel,
    architecture: Architecture,
    *,
    report: Callable[[], NBLReport | None],
    before: Callable[[], None] = lambda: None,
) -> None:
    """
    Make ``model.save_pretrained`` write a linearized checkpoint. Safe to call again.

    :param model: the causal language model, with layers replaced
    :param architecture: its family
    :param report: returns its report when it is saved, None to save without
    :param before: called before it is saved; converts the model if need be
    """
    record = _record_of(model)
    stages = record.stages if record is not None else ()
    _keep_record(model, _Record(report, stages))
    modify_save_pretrained(model)

    def prepare() -> None:
        before()
        keep_expert_names(model, architecture)
        fuse_experts(model)

    publish_on_save(
        model,
        architecture,
        before=prepare,
        extra_files=partial(_write_extra_files, model),
        is_source_process=is_source_process,
        defaults=lambda: {"max_shard_size": _SHARD_BYTES} if on_disk(model) else {},
    )


def register() -> None:
    """
    Let ``oneshot()`` load linearized checkpoints, and save them as what they are.
    """
    register_classes()
    wrap_saving(_publish_linearized)


def _publish_linearized(model: PreTrainedModel) -> None:
    """Called by ``oneshot()`` when it has loaded its model, before it runs."""
    families = {family.nbl_model_type: family for family in ARCHITECTURES.values()}
    architecture = families.get(model.config.model_type)
    if architecture is None or model.config.nbl_config is None:
        return
    report = report_of(model)
    if report is not None:  # figures of the checkpoint that this run starts from
        report = dataclasses.replace(report, evaluation=None)
    session, record = active_session(), _record_of(model)
    if record is not None and session.state.model is model:
        # Compressed in memory before. llm-compressor reads earlier recipes from where
        # a model was loaded, and there this one is not.
        stages = (*record.stages, *_stages(session.lifecycle.recipe.yaml()))
        _keep_record(model, _Record(record.report, stages))
    publish(model, architecture, report=lambda: report)


def _report_on_disk(model: PreTrainedModel) -> NBLReport | None:
    path = None
    with contextlib.suppress(OSError, ValueError):  # moved away since it was loaded
        path = cached_file(
            model.config._name_or_path,
            REPORT_FILE_NAME,
            _raise_exceptions_for_missing_entries=False,
        )
    return NBLReport.load(path) if path else None


def _write_extra_files(model: PreTrainedModel, directory: Path) -> None:
    record = _record_of(model)
    assert record is not None
    recipe = _write_recipe(directory, record.stages)
    report = record.report()
    if report is not None:
        write_report(dataclasses.replace(report, recipe=recipe), directory)
    oneshot = running_oneshot()
    # annotated str, for what the caller may pass; by now it is loaded
    processor: Any = oneshot.processor if oneshot is not None else None
    if processor is not None:
        # oneshot() writes it after the model; in here it cannot be missing from a
        # checkpoint whose run was killed in between.
        processor.save_pretrained(directory)


def _write_recipe(directory: Path, earlier: tuple[tuple[str, Any], ...]) -> str:
    """
    Rewrite ``recipe.yaml`` so that the recipes of all runs load, as one.

    llm-compressor names the stages of two runs ``default_stage_0`` and
    ``default_stage_1`` (llmcompressor 0.14.0.1, recipe/utils.py,
    ``append_recipe_dict``) and reads only what ends in ``_stage``: an empty recipe. It
    also writes tuples and enumerations as Python objects, which it refuses to read.

    :param directory: the checkpoint
    :param earlier: stages of earlier runs that llm-compressor does not know of
    :return: the recipe
    """
    path = directory / RECIPE_FILE_NAME
    *before, last = _stages(path.read_text(encoding="utf-8"))
    # The last one is empty for a model that was loaded and saved, not compressed again.
    stages = [(name, run) for name, run in (*before, *earlier, last) if run]
    numbered = len(stages) > 1
    content = {
        f"{_STAGE_SUFFIX.sub('', name)}{f'_{number}' if numbered else ''}_stage": run
        for number, (name, run) in enumerate(stages)
    }
    text = yaml.dump(
        content,
        allow_unicode=True,
        sort_keys=False,
        default_flow_style=None,
        width=88,
    )
    path.write_text(text, encoding="utf-8")
    return text


class _PlainLoader(yaml.SafeLoader):
    """Reads Python objects as the plain values that they were made of."""


def _construct_plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        values = loader.construct_sequence(node, deep=True)
        # an enumeration's member: its class called with its value
        return values[0] if suffix.startswith("object/apply:") else values
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _construct_plain)


def _stages(recipe: str) -> list[tuple[str, Any]]:
    """Return name and content of a recipe's stages, in plain values."""
    # a SafeLoader: it makes no objects
    return list(yaml.load(recipe, _PlainLoader).items())
