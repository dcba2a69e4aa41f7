"""
Configuration of linearized checkpoints: which layers are linear, and in what way.

Imports only transformers and the table of architectures, since this file is also
copied beside checkpoints that load with ``trust_remote_code=True``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .architectures import ARCHITECTURES, Architecture

__all__ = ["FORMAT_VERSION", "LinearizedLayer", "NBLConfigMixin", "config_class"]

#: Version of the ``nbl_config`` block; a reader refuses a newer one.
FORMAT_VERSION = 1

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
                    f"{getattr(self, field)!r}. {_WRITTEN_BY_ANOTHER}"
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
        unknown = sorted(set(entry) - {field.name for field in fields(cls)})
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

    def linearized_layers(self) -> dict[int, LinearizedLayer]:
        """
        Return the linearized layers by decoder layer index, in order.

        :raises ValueError: if the block is missing, of a newer format, or names a layer
            that the model does not have
        """
        block = self.nbl_config
        if block is None:
            raise ValueError(
                "config.json has no `nbl_config` block, which names the linearized "
                "layers. The checkpoint is damaged; write it again with nbl_modifier."
            )
        if block["version"] > FORMAT_VERSION:
            raise ValueError(
                f"nbl_config: format version {block['version']} is newer than "
                f"{FORMAT_VERSION}, the newest this nbl_modifier reads. Upgrade with "
                "`pip install -U nbl-modifier`."
            )
        layers = {
            int(index): LinearizedLayer.from_entry(entry)
            for index, entry in sorted(
                block["layers"].items(), key=lambda item: int(item[0])
            )
        }
        text: Any = self.get_text_config()  # type: ignore[attr-defined]
        num_layers: int = text.num_hidden_layers
        outside = [index for index in layers if not 0 <= index < num_layers]
        if outside:
            raise ValueError(
                f"nbl_config: layers {outside} do not exist, the model has layers 0 to "
                f"{num_layers - 1}."
            )
        return layers


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
