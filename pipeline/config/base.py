"""What all configuration models share: closed, immutable, documented field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic_core import CoreSchema, core_schema


class Model(BaseModel):
    """Base of every configuration model: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


@dataclass(frozen=True)
class NameIn:
    """Annotation of a field that holds a name of a literal table: what `Literal` of these names would be."""

    table: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the schema that pydantic makes of a Literal."""
        return core_schema.literal_schema(list(self.table))


class Listed(Protocol):
    """A line of a literal table that says what it is."""

    @property
    def about(self) -> str:
        """What its name stands for, without a full stop."""
        ...


def described(table: Mapping[str, Listed]) -> str:
    """Return the documentation of a field that holds a name of `table`."""
    return " ".join(f"{name}: {line.about}." for name, line in table.items())


class FieldError(ValueError):
    """What a validator finds wrong with one key below the model that it validates.

    Args:
        what: one line, with the value found.
        path: the key, from that model.
        fix: what to do.
    """

    def __init__(self, what: str, *, path: tuple[str, ...], fix: str | None = None) -> None:
        super().__init__(what if fix is None else f"{what}; {fix}")
        self.what = what
        self.path = path
        self.fix = fix
