"""What all configuration models share: closed, immutable, documented field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """Base of every configuration model: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


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
