"""What all configuration models share: closed, immutable, documented field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from storage.errors import UsageError
from storage.files import open_files


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


def _place_of_a_store(path: Path) -> Path:
    try:
        open_files(path)
    except UsageError as error:
        raise FieldError(f"store: {error.what}", path=(), fix=error.fix) from error
    return path


StoreDirectory = Annotated[Path, AfterValidator(_place_of_a_store)]
