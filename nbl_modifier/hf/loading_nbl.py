"""
What linearized models load and save besides what stock models do.

Imports only torch, transformers and its siblings: copied beside checkpoints, see
``modeling_nbl``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from nbl_modifier.architectures import Architecture, architecture_of

from .configuration_nbl import LinearizedLayer, config_class

__all__ = [
    "MODELLING_CODE",
    "CheckpointFiles",
    "auto_map",
    "check_tensors",
    "copy_modelling_code",
    "layers_path",
    "stock_abilities",
]

_HERE = Path(__file__).parent
#: What transformers needs to load a checkpoint; torch and transformers are all that it
#: imports. Beside a checkpoint the first one is, too.
MODELLING_CODE = (
    next(
        folder / "architectures.py"
        for folder in (_HERE, _HERE.parent)
        if (folder / "architectures.py").exists()
    ),
    _HERE / "cache_nbl.py",
    _HERE / "configuration_nbl.py",
    _HERE / "loading_nbl.py",
    _HERE / "modeling_nbl.py",
)


def layers_path(model: nn.Module, architecture: Architecture) -> str:
    """Return the path of the decoder layers in a model, with or without a head."""
    if isinstance(model, PreTrainedModel) and model.base_model is model:
        # A base model has no outer `model.`: its own attributes start one level down.
        return architecture.layers.removeprefix(model.base_model_prefix + ".")
    return architecture.layers


# What transformers 5.17 to 5.19 tells by the text of the file that a class is defined
# in (modeling_utils.py): whether `set_attn_implementation` may exchange attention, as
# continuous batching and attention quantization have to, and likewise for experts. This
# package's files say nothing about the attention and the experts that are kept.
_READ_FROM_SOURCE = (
    "_can_set_attn_implementation",
    "_can_set_experts_implementation",
)


def stock_abilities(base: type[PreTrainedModel]) -> dict[str, Any]:
    """
    Return class methods that answer as those of ``base`` do, whoever was asked first.

    :param base: the stock class
    """

    def answering(name: str) -> classmethod[Any, Any, bool]:
        def answer(_: type[PreTrainedModel]) -> bool:
            able: bool = getattr(base, name)()
            return able

        return classmethod(answer)

    return {name: answering(name) for name in _READ_FROM_SOURCE}


class CheckpointFiles:
    """Mixin of the models: what a checkpoint must hold, and what is put into one."""

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """
        Refuse a checkpoint whose tensors are not those of the replaced layers.

        transformers (5.17 to 5.19, modeling_utils.py) calls it when it has loaded all
        it found; it only warns of the rest, and goes on with random values.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        model: Any = self
        architecture = architecture_of(model.config.model_type)
        # What is too many has the checkpoint's name, also in a model without a head.
        paths = {layers_path(model, architecture), architecture.layers}
        missing = loading_info.missing_and_mismatched()
        for index, spec in model.config.linearized_layers().items():
            for path in paths:
                check_tensors(
                    f"{path}.{index}.",
                    architecture,
                    spec,
                    missing=missing,
                    found=loading_info.unexpected_keys,
                    checkpoint=model.name_or_path,
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Save as transformers does, with the modelling files that ``auto_map`` names.

        :param save_directory: where to
        :param is_main_process: whether this process writes, in a distributed run
        :param kwargs: of ``PreTrainedModel.save_pretrained``
        :raises NotImplementedError: for ``push_to_hub``, which would upload the
            checkpoint without them
        """
        if kwargs.get("push_to_hub"):
            raise NotImplementedError(
                "save_pretrained(push_to_hub=True) would upload the files before they "
                "are complete. Use model.push_to_hub(...) instead."
            )
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, **kwargs
        )
        path = Path(save_directory) / CONFIG_NAME
        if is_main_process and path.exists():  # not beside an adapter alone
            model: Any = self
            content = json.loads(path.read_text(encoding="utf-8"))
            content["auto_map"] = auto_map(architecture_of(model.config.model_type))
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            path.write_text(text, encoding="utf-8")
            copy_modelling_code(Path(save_directory))


def check_tensors(
    layer: str,
    architecture: Architecture,
    spec: LinearizedLayer,
    *,
    missing: Iterable[str],
    found: Iterable[str],
    checkpoint: str,
) -> None:
    """
    Refuse a checkpoint whose tensors are not those of a replaced layer.

    :param layer: name of the decoder layer in the checkpoint, with a dot at its end
    :param architecture: names of the modules inside it
    :param spec: what was done to it
    :param missing: names of tensors that the checkpoint lacks, of other layers, too
    :param found: names of tensors that it has, all, or those that are too many
    :param checkpoint: where it is, for the message
    :raises ValueError: naming layer and tensor
    """
    parts = [""]  # of the layer: all of it is replaced
    if spec.kind == "attention":
        parts = [f"{architecture.attention}."]
        parts += [f"{norm}." for norm in architecture.folded_norms(spec.input)]
    replaced = tuple(layer + part for part in parts)
    linear = f"{replaced[0]}linear."
    subject = f"{replaced[0].removesuffix('.')}: what replaced it "
    remedy = (
        f"in checkpoint {checkpoint}. Its config.json and its weights are not of one "
        "model, or a file of it is missing: copy or write it again."
    )
    lacking = sorted(name for name in missing if name.startswith(linear))
    if lacking:
        raise ValueError(f"{subject}needs the tensor {lacking[0]}, found none {remedy}")
    surplus = sorted(
        name
        for name in found
        if name.startswith(replaced)
        and (spec.method == "drop" or not name.startswith(linear))
    )
    if surplus:
        raise ValueError(f"{subject}has no tensor {surplus[0]}, found one {remedy}")


def auto_map(architecture: Architecture) -> dict[str, str]:
    """
    Return the entry of ``config.json`` by which transformers finds the modelling files.

    :param architecture: the family
    """
    return {
        "AutoConfig": f"configuration_nbl.{config_class(architecture).__name__}",
        "AutoModel": f"modeling_nbl.{architecture.nbl_base_model}",
        architecture.auto_class: f"modeling_nbl.{architecture.nbl_causal_lm}",
    }


def copy_modelling_code(directory: Path) -> None:
    """
    Let transformers load the checkpoint without nbl_modifier, where the user allows it.

    With ``trust_remote_code=True`` the classes of ``auto_map`` come from these files.
    Where nbl_modifier is registered they are not looked at.

    :param directory: the checkpoint
    """
    for source in MODELLING_CODE:
        text = source.read_text(encoding="utf-8")
        # Beside a checkpoint there is no package to import from, only siblings.
        text = text.replace("from nbl_modifier.architectures", "from .architectures")
        (directory / source.name).write_text(text, encoding="utf-8")
