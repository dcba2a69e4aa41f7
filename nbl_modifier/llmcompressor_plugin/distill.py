"""The field of NBLModifier that says how maps are trained."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from .rules import refuse_boolean

__all__ = ["Distill"]


class Distill(BaseModel):
    """
    How the maps are trained after all fits; equal ones are interchangeable.

    :param epochs: how often at most over the calibration windows; 0 leaves the maps as
        they are fitted
    :param rate: learning rate: by how much one step may change an output of a map at
        most, over its standard deviation; dimensionless. None: found on held-out
        windows
    :param windows_per_step: windows that a step is taken on, in all processes together,
        a multiple of their number. None: one of each process
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=0, ge=0)
    rate: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    windows_per_step: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        if isinstance(given, cls):
            return given
        names = ", ".join(cls.model_fields)
        if not isinstance(given, dict):
            raise ValueError(f"must hold fields, {names}, got {given!r}.")
        unknown = sorted(map(str, set(given) - set(cls.model_fields)))
        if unknown:
            raise ValueError(
                f"distill has no field {', '.join(unknown)}, got {given}. Its fields: "
                f"{names}."
            )
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        refuse_boolean(value)
        return value

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As llm-compressor saves recipes, though not what is nested in a field."""
        return {name: v for name, v in serialize(self).items() if v is not None}

    def __repr__(self) -> str:
        """Return what to write in a recipe."""
        fields = (f"{name}: {value}" for name, value in self.model_dump().items())
        return f"{{{', '.join(fields)}}}"

    __str__ = __repr__
