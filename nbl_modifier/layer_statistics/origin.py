"""What statistics are of, and what they can be used for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, get_type_hints

__all__ = ["REMEDY", "Origin"]

#: What helps against statistics that cannot be used.
REMEDY = "Calibrate again into another folder"


@dataclass(frozen=True)
class Origin:
    """
    What statistics are of.

    :param model: name or path, for messages
    :param model_digest: of configuration and weights
    :param data_digest: of the tokens
    :param num_samples: calibration sequences
    :param held_out: those of them that only measure the error
    :param kind: the part of each layer: ``attention`` or ``block``
    :param input: ``residual``, or ``normalized`` where the input norm's output was
        measured too, from which either can be fitted
    :param windows_digest: of the held-out windows; None if none are stored, or by
        format version 2
    :param loss_masks: whether the masks that came with the data were used; None if none
        came, or by a version that did not say
    """

    model: str
    model_digest: str
    data_digest: str
    num_samples: int
    held_out: int
    kind: str
    input: str
    windows_digest: str | None = None
    loss_masks: bool | None = None

    def fields(self) -> dict[str, Any]:
        """Return what is known, by name, as it is stored."""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """
        Return what was stored by :meth:`fields`.

        :param fields: read from a file that anybody may have written
        :raises ValueError: naming those that are missing, unknown or of another type
        """
        types = get_type_hints(cls)
        wrong = [
            f"{name}={fields.get(name)!r}"
            for name in sorted(types.keys() | fields.keys())
            if not isinstance(fields.get(name), types.get(name, ()))
        ]
        if wrong:
            raise ValueError(f"found {', '.join(wrong)}")
        return cls(**fields)

    def check(self, wanted: Origin, folder: str | os.PathLike[str]) -> None:
        """
        Refuse statistics to be used for anything else than what they are of.

        :param wanted: what they are to be used for; what of it is not known (empty, 0
            or None) is not compared
        :param folder: where they are, for the message
        :raises ValueError: naming the difference
        """
        for field, subject in (
            ("model_digest", f"model {wanted.model}"),
            ("data_digest", "calibration data"),
            ("windows_digest", "set of held-out windows"),
            ("held_out", "number of held-out sequences"),
            ("kind", "kind"),
        ):
            found, needed = getattr(self, field), getattr(wanted, field)
            if needed and found != needed:
                raise ValueError(
                    f"statistics {folder}: taken with {field} {found} (model "
                    f"{self.model}), but this run's {subject} has {needed}. {REMEDY}, "
                    "or use the model and data they are of."
                )
        masks = self.loss_masks
        if None not in (masks, wanted.loss_masks) and masks != wanted.loss_masks:
            raise ValueError(
                f"statistics {folder}: taken with use_loss_mask={masks}, but this run "
                f"has use_loss_mask={wanted.loss_masks}, and other tokens count. Pass "
                f"use_loss_mask={masks} to oneshot(). {REMEDY} for the other."
            )
        if wanted.input == "normalized" and self.input != "normalized":
            raise ValueError(
                f"statistics {folder}: taken with input {self.input}, which says "
                "nothing about the output of the input norm, and this run's input is "
                f"normalized. {REMEDY} with input: normalized, which serves both."
            )
