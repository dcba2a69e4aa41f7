"""
Configuration of linearized checkpoints: which layers are linear, and in what way.

Imports only transformers and the table of architectures, since this file is also
copied beside checkpoints that load with ``trust_remote_code=True``.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nbl_modifier.architectures import ARCHITECTURES, Architecture

__all__ = [
    "FORMAT_VERSION",
    "REFUSED_BY_STOCK_CLASSES",
    "LinearizedLayer",
    "NBLConfigMixin",
    "config_class",
]

#: Version of the ``nbl_config`` block; a reader refuses a newer one.
FORMAT_VERSION = 1

#: Stands in ``config.json`` where every configuration of transformers wants a bool, so
#: that stock classes, which look neither at ``model_type`` nor at ``auto_map``, refuse
#: the file with these words, instead of making attention of random weights.
REFUSED_BY_STOCK_CLASSES = {
    "return_dict": "this checkpoint has layers without attention and loads by the Auto "
    "classes, with nbl_modifier installed and imported or with trust_remote_code=True"
}

# "7" but not "07", " 7" or "7.0": two keys must not be one layer
_LAYER = re.compile("0|-?[1-9][0-9]{0,8}")
_WRITTEN_BY_ANOTHER = (
    "The checkpoint was written by a newer nbl_modifier, or edited; upgrade with "
    "`pip install -U nbl-modifier`."
)


@dataclass(frozen=True)
class LinearizedLayer:
    """
    What is done to one decoder layer.

    A dropped block has no entry in a checkpoint: it is not there at all, and the layers
    after it have moved up.

    :param input: what the replacement reads: the ``residual`` stream (the norms in
        front are folded into the map and gone) or the input norm's output
        (``normalized``)
    :param kind: the part of the layer that was replaced: its ``attention``, or the
        whole transformer ``block``, MLP and norms included
    :param method: what replaced it: a ``linear`` map of each token, or nothing
        (``drop``)
    :param rank: of the linear map, which is then two thin layers; None: full rank, one
        square layer
    :raises ValueError: for what this version does not know
    """

    input: Literal["residual", "normalized"] = "residual"
    kind: Literal["attention", "block"] = "attention"
    method: Literal["linear", "drop"] = "linear"
    rank: int | None = None

    def __post_init__(self) -> None:
        for field, allowed in (
            ("input", ("residual", "normalized")),
            ("kind", ("attention", "block")),
            ("method", ("linear", "drop")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"nbl_config: {field} must be one of {allowed}, got "
                    f"{getattr(self, field)!r:.200}. {_WRITTEN_BY_ANOTHER}"
                )
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(
                f"nbl_config: rank must be null or an integer >= 1, got {self.rank!r}. "
                f"{_WRITTEN_BY_ANOTHER}"
            )
        if self.method == "drop" and self.rank is not None:
            raise ValueError(
                f"nbl_config: method drop has no rank, got {self.rank}. "
                f"{_WRITTEN_BY_ANOTHER}"
            )
        if self.kind == "block" and self.input != "residual":
            raise ValueError(
                "nbl_config: kind block reads the residual stream, so input must be "
                f"'residual', got {self.input!r}. {_WRITTEN_BY_ANOTHER}"
            )

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """
        Return the layer that an entry of ``config.json`` describes.

        :param entry: its fields; what an earlier version did not write has its default
        :raises ValueError: if there is a field or value that this version does not know
        """
        if not isinstance(entry, dict):
            raise ValueError(
                f"nbl_config: a layer must be described by fields, got {entry!r}. "
                f"{_WRITTEN_BY_ANOTHER}"
            )
        unknown = sorted(map(str, set(entry) - {field.name for field in fields(cls)}))
        if unknown:
            raise ValueError(
                f"nbl_config: a layer has the unknown field {', '.join(unknown)}. "
                f"{_WRITTEN_BY_ANOTHER}"
            )
        layer = cls(**entry)
        if (layer.kind, layer.method) == ("block", "drop"):
            raise ValueError(
                "nbl_config: a dropped block has no entry in a checkpoint, got one. "
                f"{_WRITTEN_BY_ANOTHER}"
            )
        return layer


class NBLConfigMixin:
    """Adds the ``nbl_config`` block to a base model's configuration class."""

    nbl_config: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Return the configuration that ``config.json`` describes.

        :param config_dict: its content
        """
        config_dict = {
            key: value
            for key, value in config_dict.items()
            if not (key in REFUSED_BY_STOCK_CLASSES and isinstance(value, str))
        }
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        """Return the content of ``config.json``, which only our classes read."""
        text: str = super().to_json_string(*args, **kwargs)  # type: ignore[misc]
        content = json.loads(text) | REFUSED_BY_STOCK_CLASSES
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def linearized_layers(self) -> dict[int, LinearizedLayer]:
        """
        Return the linearized layers by decoder layer index, in order.

        :raises ValueError: if the block is missing, damaged, of a newer format, or does
            not fit the model
        """
        block = self.nbl_config
        if block is None:
            raise ValueError(
                "config.json has no `nbl_config` block, which names the linearized "
                "layers. The checkpoint is damaged; write it again with nbl_modifier."
            )
        entries = _checked_entries(block)
        layers = {
            index: LinearizedLayer.from_entry(entries[index]) for index in entries
        }
        text: Any = self.get_text_config()  # type: ignore[attr-defined]
        num_layers: int = text.num_hidden_layers
        outside = [index for index in layers if not 0 <= index < num_layers]
        if outside:
            raise ValueError(
                f"nbl_config: layers {outside} do not exist, the model has layers 0 to "
                f"{num_layers - 1}. {_WRITTEN_BY_ANOTHER}"
            )
        for index, layer in layers.items():
            if layer.rank is not None and layer.rank > text.hidden_size:
                raise ValueError(
                    f"nbl_config: layer {index} has rank {layer.rank}, more than the "
                    f"hidden size of {text.hidden_size}. {_WRITTEN_BY_ANOTHER}"
                )
        return layers


def _checked_entries(block: Any) -> dict[int, Any]:
    """Return what the block says of each layer, by index, in order."""
    if not isinstance(block, dict):
        raise ValueError(
            f"nbl_config: must hold fields, got {block!r}. {_WRITTEN_BY_ANOTHER}"
        )
    version, entries = block.get("version"), block.get("layers")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"nbl_config: version must be an integer >= 1, got {version!r}. "
            f"{_WRITTEN_BY_ANOTHER}"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"nbl_config: format version {version} is newer than {FORMAT_VERSION}, the "
            "newest this nbl_modifier reads. Upgrade with "
            "`pip install -U nbl-modifier`."
        )
    if not isinstance(entries, dict) or not all(
        map(_LAYER.fullmatch, map(str, entries))
    ):
        raise ValueError(
            "nbl_config: layers must hold a description by layer number, got "
            f"{entries!r:.200}. {_WRITTEN_BY_ANOTHER}"
        )
    return {int(key): entries[key] for key in sorted(entries, key=int)}


def nbl_config_block(
    layers: dict[int, LinearizedLayer], **provenance: Any
) -> dict[str, Any]:
    """
    Return the JSON form of ``layers``, the ``nbl_config`` block of ``config.json``.

    :param layers: the linearized layers by decoder layer index
    :param provenance: plain values kept beside them, e.g. ``criterion``
    """
    return {
        "version": FORMAT_VERSION,
        "layers": {str(index): asdict(layers[index]) for index in sorted(layers)},
        **provenance,
    }


def _make_config_class(architecture: Architecture) -> type[PreTrainedConfig]:
    base = CONFIG_MAPPING[architecture.model_type]
    return type(
        "NBL" + base.__name__,
        (NBLConfigMixin, base),
        {"model_type": architecture.nbl_model_type, "__module__": __name__},
    )


_CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {}


def config_class(architecture: Architecture) -> type[PreTrainedConfig]:
    """Return the configuration class of the family's linearized models."""
    if architecture.model_type not in _CONFIG_CLASSES:
        _CONFIG_CLASSES[architecture.model_type] = _make_config_class(architecture)
    return _CONFIG_CLASSES[architecture.model_type]


def __getattr__(name: str) -> type[PreTrainedConfig]:
    # Classes are made on first use: importing all families' configurations would load
    # a dozen transformers modules into every vLLM worker.
    for architecture in ARCHITECTURES.values():
        if name.startswith("NBL") and config_class(architecture).__name__ == name:
            return config_class(architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
