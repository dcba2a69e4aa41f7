"""
Writing linearized checkpoints: whole or not at all, and never as the base model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from nbl_modifier.architectures import Architecture

from .configuration_nbl import (
    REFUSED_BY_STOCK_CLASSES,
    LinearizedLayer,
    NBLConfigMixin,
    config_class,
    nbl_config_block,
)
from .directories import is_interrupted, recover, replaced
from .loading_nbl import MODELLING_CODE, auto_map, copy_modelling_code
from .modeling_nbl import model_class
from .shortening import (
    DROPPED_BLOCKS,
    keep_layer_fields,
    remove_dropped_blocks,
    renumbered,
)

__all__ = [
    "check_output_directory",
    "convert_in_place",
    "is_of_checkpoint",
    "publish_on_save",
]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Of an earlier checkpoint, not of whoever keeps notes beside it.
_DESCRIPTION = ("config.json", "generation_config.json", "recipe.yaml", "README.md")
# What was measured on its weights says nothing about the new ones.
_MEASURED = (
    *("nbl_report.json", "nbl_evaluation.json", "nbl_measurements.json"),
    "nbl_methods.json",
    *("nbl_benchmark.json", "nbl_benchmark.md", "nbl_ranking.json", "nbl_ranking.png"),
)
# Whatever a tokenizer or processor of transformers writes.
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates", "*processor_config.json"),
)


def convert_in_place(
    model: PreTrainedModel,
    architecture: Architecture,
    layers: dict[int, LinearizedLayer],
    **provenance: Any,
) -> None:
    """
    Make a base model whose layers were already replaced an ``NBL*ForCausalLM``.

    Dropped blocks are removed. If there is nothing else, what is left is a smaller
    model of the base class, which any engine loads; otherwise the classes of the model
    and of its configuration change. The configuration is changed in place, since every
    submodule holds a reference to it. Safe to call again.

    :param model: the causal language model
    :param architecture: its family
    :param layers: what was done to each layer, by index before blocks are removed
    :param provenance: plain values to keep in ``nbl_config``, e.g. ``criterion``
    """
    remove_dropped_blocks(model, architecture)
    config, left = model.config, renumbered(layers)
    if not left:
        return
    config.__class__ = config_class(architecture)
    # from_pretrained() leaves the base's model_type on the instance, which would
    # shadow the new class's and save a checkpoint that claims to be the base model.
    config.__dict__.pop("model_type", None)
    config.nbl_config = nbl_config_block(left, **provenance)
    model.__class__ = model_class(architecture.causal_lm, architecture)
    config.architectures = [architecture.nbl_causal_lm]


def check_output_directory(
    directory: str | os.PathLike[str], architecture: Architecture
) -> None:
    """
    Refuse a directory that cannot be written or holds another model.

    An earlier checkpoint of the same family may be written over, linearized or with
    blocks dropped. One that was complete, but not yet in its place when its run was
    killed, is put there first.

    :param directory: where a checkpoint is to be written; need not exist
    :param architecture: the family of the model to be written
    :raises NotADirectoryError: if it, or something above it, is a file
    :raises PermissionError: if it, or the nearest directory above it, is read-only
    :raises FileExistsError: if it holds the weights of another model
    """
    path = Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"output directory {path}: {existing} is a file. Choose another directory."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output directory {path}: cannot write to {existing}. Choose another "
            "directory, or change its permissions."
        )
    recover(path)
    has_config = (path / CONFIG_NAME).exists()
    has_weights = any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    if not has_config and (not has_weights or is_interrupted(path)):
        return
    config: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((path / CONFIG_NAME).read_text())
    found = config.get("model_type")
    shortened = found == architecture.model_type and DROPPED_BLOCKS in config
    if found != architecture.nbl_model_type and not shortened:
        raise FileExistsError(
            f"output directory {path} holds another model (model_type {found!r}; this "
            f"one is {architecture.nbl_model_type!r}). Choose another directory, or "
            "empty that one."
        )


def publish_on_save(
    model: PreTrainedModel,
    architecture: Architecture,
    *,
    before: Callable[[], None],
    extra_files: Callable[[Path], None],
    is_source_process: Callable[[], bool] = lambda: True,
    defaults: Callable[[], dict[str, Any]] = dict,
) -> None:
    """
    Make ``model.save_pretrained`` write what was made, whole or not at all.

    The checkpoint is written to a hidden directory, which takes the target's place when
    it is complete (:func:`nbl_modifier.hf.directories.replaced`). Until the very last
    step its ``config.json`` lacks the ``nbl_config`` block, without which nothing loads
    it. A run that is killed at any moment leaves what was there before, or the new
    checkpoint. Wraps llm-compressor's own wrapper, which compresses.

    :param model: the causal language model, with layers replaced
    :param architecture: its family
    :param before: called first; converts the model if that is still to be done
    :param extra_files: writes the report and the model card into a directory
    :param is_source_process: whether this process writes, in a distributed run
    :param defaults: returns arguments of ``save_pretrained`` that hold if not given
    """
    # If it was published before, with another report: not one inside the other.
    inner = getattr(model.save_pretrained, "_inner", model.save_pretrained)

    @wraps(inner)
    def save_pretrained(
        save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        target = Path(save_directory).absolute()
        check_output_directory(target, architecture)
        if kwargs.get("push_to_hub"):
            raise NotImplementedError(
                "save_pretrained(push_to_hub=True) would upload the files before they "
                "are complete. Use model.push_to_hub(...) instead."
            )
        before()
        kwargs = defaults() | kwargs
        if not is_source_process():  # gathers weights, writes nothing
            with _unfinished_config(model.config, architecture):
                inner(str(target), *args, **kwargs)
            return
        with replaced(target, is_of_checkpoint) as staging:
            with (
                _unfinished_config(model.config, architecture),
                _full_disk_named(target),
            ):
                inner(str(staging), *args, **kwargs)
            _finish(staging, model.config, architecture, extra_files)

    # llm-compressor wraps what does not carry this mark; a later oneshot() on this
    # model must not wrap it again and rewrite config.json after it.
    save_pretrained._overridden = True  # type: ignore[attr-defined]
    save_pretrained._inner = inner  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _finish(
    staging: Path,
    config: PretrainedConfig,
    architecture: Architecture,
    extra_files: Callable[[Path], None],
) -> None:
    """Write what a checkpoint has beside its weights, ``config.json`` at last."""
    content = _finished_config(staging, config, architecture)
    if isinstance(config, NBLConfigMixin):
        copy_modelling_code(staging)
    extra_files(staging)
    finished = staging / f"{CONFIG_NAME}.finished"
    finished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    finished.replace(staging / CONFIG_NAME)


@contextlib.contextmanager
def _unfinished_config(
    config: PretrainedConfig, architecture: Architecture
) -> Iterator[None]:
    """
    Have a ``config.json`` written that no loader accepts.

    While saving, llm-compressor replaces the file that transformers wrote by the one at
    ``config._name_or_path`` (llmcompressor 0.14.0.1,
    transformers/compression/compressed_tensors_utils.py, ``resave_config``): the base
    model's, under which the checkpoint would load with random attention weights. It
    finds one of the linearized model type instead. Stock transformers does not know
    that type, and its own classes refuse it without the ``nbl_config`` block, which
    :func:`_finished_config` adds.
    """
    name_or_path = config._name_or_path
    block = getattr(config, "nbl_config", None)
    with tempfile.TemporaryDirectory() as folder:
        if name_or_path:  # otherwise transformers' own file is kept
            content = _base_config(config)
            keep_layer_fields(config, content)
            content |= {
                "model_type": architecture.nbl_model_type,
                "architectures": [architecture.nbl_causal_lm],
                "nbl_config": None,
            }
            content.pop("auto_map", None)
            (Path(folder) / CONFIG_NAME).write_text(json.dumps(content))
            config._name_or_path = folder
        if block is not None:
            config.nbl_config = None
        try:
            yield
        finally:
            config._name_or_path = name_or_path
            if block is not None:
                config.nbl_config = block


def _base_config(config: PretrainedConfig) -> dict[str, Any]:
    # The original file rather than transformers' rendering of it: other readers of the
    # checkpoint know its spelling.
    original = None
    with contextlib.suppress(OSError, ValueError):  # moved away since it was loaded
        original = cached_file(
            config._name_or_path,
            CONFIG_NAME,
            _raise_exceptions_for_missing_entries=False,
        )
    content: dict[str, Any] = (
        json.loads(Path(original).read_text()) if original else config.to_dict()
    )
    return content


def _finished_config(
    directory: Path, config: PretrainedConfig, architecture: Architecture
) -> dict[str, Any]:
    """
    Return what ``config.json`` of the saved checkpoint has to hold.

    :raises RuntimeError: if it was saved as that of another class
    """
    saved: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text())
    if not isinstance(config, NBLConfigMixin):
        # Only blocks were dropped: the base model with fewer layers, for any engine.
        saved.pop("nbl_config", None)
        return saved | {
            "model_type": architecture.model_type,
            "architectures": [architecture.causal_lm],
        }
    expected = (architecture.nbl_model_type, [architecture.nbl_causal_lm])
    if (saved.get("model_type"), saved.get("architectures")) != expected:
        raise RuntimeError(
            f"config.json was saved with model_type {saved.get('model_type')!r} and "
            f"architectures {saved.get('architectures')}, expected {expected}: it "
            "would load as the base model with random attention weights, so nothing "
            "was kept. nbl_modifier was not tested with this llm-compressor."
        )
    return saved | {
        "nbl_config": config.nbl_config,
        "auto_map": auto_map(architecture),
        **REFUSED_BY_STOCK_CLASSES,
    }


def is_of_checkpoint(path: Path, new: Collection[str]) -> bool:
    """
    Return whether an entry of the directory belongs to the checkpoint written over.

    A tokenizer does if the new checkpoint brings its own. If it brings none,
    ``tokenizer.save_pretrained`` may have been called before the model's.

    :param path: the entry
    :param new: names of the entries of the new checkpoint
    """

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    code = (source.name for source in MODELLING_CODE)
    if path.is_file() and matches(
        path.name, (*_WEIGHTS, *_MEASURED, *_DESCRIPTION, *code)
    ):
        return True
    brings_tokenizer = any(matches(name, _TOKENIZER) for name in new)
    return brings_tokenizer and matches(path.name, _TOKENIZER)


@contextlib.contextmanager
def _full_disk_named(target: Path) -> Iterator[None]:
    """Have an error that says where there is no room, which safetensors' does not."""
    try:
        yield
    except SafetensorError as err:
        free = shutil.disk_usage(target.parent).free
        raise OSError(
            f"output directory {target}: the weights cannot be written ({err}), "
            f"{free / 1e9:.2f} GB are free. What was there is kept. Make room, or "
            "choose another directory."
        ) from err
