"""What all configuration models share: closed, immutable, documented field by field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import CoreSchema, core_schema

from storage.errors import DistillError, UsageError
from storage.files import open_files

DIGEST = "^[0-9a-f]{64}$"
SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
DURATION = rf"^[1-9]\d{{0,5}} ?({'|'.join(SECONDS)})$"
# Of fields that hold text of a form: the form in words.
PATTERNS = {DIGEST: "64 hexadecimal digits (0-9 and a-f)", DURATION: "a time such as 90 s, 10 min or 2 h"}


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


@contextmanager
def section(key: str, model: type[BaseModel]) -> Iterator[None]:
    """Make errors of a stage point into the configuration: it names its own parameters, which stand below `key`.

    Args:
        key: of the section; errors that name no parameter point at the section itself.
        model: of the section, whose fields are those parameters.
    """
    try:
        yield
    except DistillError as error:
        named = re.match(r"(\w+)(?=$|[:,])", error.where or "")
        if error.where is None:
            error.where = key
        elif named is not None and named[0] in model.model_fields:
            error.where = f"{key}.{error.where}"
        if error.fix is not None:
            names = "|".join(model.model_fields)
            error.fix = re.sub(rf"\b(set|try) (?=(?:{names})\b)", rf"\1 {key}.", error.fix)
        raise


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


def _place_of_a_store(path: Path) -> Path:
    try:
        open_files(path)
    except UsageError as error:
        raise FieldError(f"store: {error.what}", path=(), fix=error.fix) from error
    return path


StoreDirectory = Annotated[Path, AfterValidator(_place_of_a_store)]
