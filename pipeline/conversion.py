"""The options of `pipeline convert` -> what `storage.tools.convert` is to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.codecs import CODECS
from storage.errors import UsageError
from storage.tools.columns import ColumnFile
from storage.tools.convert import Conversion
from storage.values import Json


def conversion_of(options: Mapping[str, Any]) -> Conversion:
    """Return the changes that the options ask for. Raises UsageError for a codec that cannot be read."""
    codec = options["codec"]
    return Conversion(
        codec=None if codec is None else codec_parameters(codec),
        k=options["k"],
        documents_per_shard=options["documents_per_shard"],
        columns=tuple(_column(text) for text in options["columns"]),
    )


def _column(text: str) -> ColumnFile:
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise UsageError(
            f"{text!r} is not NAME=FILE", where="--add-column", fix="write for example score=scores.parquet"
        )
    return ColumnFile(name, path)


def codec_parameters(text: str) -> dict[str, Json]:
    """Read `id,name=value,...`. Raises UsageError for an unknown id or a value that is no number."""
    name, *settings = text.split(",")
    if name not in CODECS:
        raise UsageError(f"unknown codec {name!r}; there are {', '.join(sorted(CODECS))}", where="--codec")
    parameters: dict[str, Json] = {"id": name}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise UsageError(
                f"{setting!r} is not NAME=NUMBER", where="--codec", fix="write for example sqrt-delta,root_step=0.01"
            ) from None
    return parameters
