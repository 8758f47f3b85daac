"""JSON values of a store: their one form as bytes, their hash, and what may stand in a field.

Data path: plan.json -> **values of the right types** -> `Plan`. Each `require_*` raises ValueError, naming the field.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

Json = Any  # a JSON value: dict, list, str, int, float, bool or None
LARGEST_DEPTH = 64  # of objects and lists inside each other: what reads a value goes as deep as it does
NOT_STATED = "not stated"
_LARGEST_EXACT = 1 << 53  # whole numbers up to this are floats without rounding
_HASH = re.compile("[0-9a-f]{64}")


def parse_json(data: bytes | str, *, most: int | None = None) -> Json:
    """Read JSON that somebody else may have written: the one way in for it.

    Args:
        data: UTF-8.
        most: bytes that it may have; None: whoever read them has looked at that.

    Raises:
        ValueError: it is longer, is not JSON, is nested deeper than any file of ours, or holds a number that JSON does
            not have, one of thousands of digits, or half a character.
    """
    if most is not None and len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    try:
        value = json.loads(data if isinstance(data, str) else data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"nested deeper than {LARGEST_DEPTH} levels") from None
    _check_tree(value)
    return value


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is not a number of JSON")


def _check_tree(value: Json) -> None:
    """Raise ValueError where a parsed value is too deep, or where text could not be written again."""
    level: list[Json] = [value]
    for _ in range(LARGEST_DEPTH):
        following: list[Json] = []
        for item in level:
            if isinstance(item, dict):
                following += item.keys()
                following += item.values()
            elif isinstance(item, list):
                following += item
            elif isinstance(item, str) and not item.isascii():
                item.encode()  # half of a surrogate pair is no character
        if not following:
            return
        level = following
    raise ValueError(f"nested deeper than {LARGEST_DEPTH} levels")


def canonical_json(value: Json) -> bytes:
    """Return the one byte string of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes, hex."""
    return hashlib.sha256(data).hexdigest()


class _Absent:
    """Stands for a key that is not there, which is as good as null."""

    def __repr__(self) -> str:
        return NOT_STATED

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)


_ABSENT: Any = _Absent()


def json_differences(stored: Json, wanted: Json, path: str = "") -> list[str]:
    """Return a line for each place in which two JSON values differ: `path: stored -> wanted`.

    A key that only one of them has is `NOT_STATED` in the other.
    """
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(stored.keys() | wanted.keys())
            for line in json_differences(
                stored.get(key, _ABSENT), wanted.get(key, _ABSENT), f"{path}.{key}" if path else key
            )
        ]
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        pairs = enumerate(zip(stored, wanted, strict=True))
        return [line for index, pair in pairs for line in json_differences(*pair, f"{path}[{index}]")]
    return [] if stored == wanted else [f"{path}: {stored!r} -> {wanted!r}"]


def as_float(value: Any) -> Any:
    """Return a whole number as the float it is, for fields where 1 and 1.0 mean the same; anything else as it is."""
    return float(value) if type(value) is int and abs(value) <= _LARGEST_EXACT else value


def is_whole(value: Any, *, most: int = _LARGEST_EXACT) -> bool:
    """Tell whether it is a whole number from 0 to `most`; true and 1.0 are none."""
    return type(value) is int and 0 <= value <= most


def is_amount(value: Any) -> bool:
    """Tell whether it is a finite number, whole or not; true is none."""
    return is_whole(abs(value)) if type(value) is int else isinstance(value, float) and math.isfinite(value)


def require_whole(name: str, value: Any, *, least: int, most: int) -> None:
    """Refuse anything but a whole number from `least` to `most`; true and 1.0 are refused too."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, found {short(value)}")


def require_number(name: str, value: Any) -> None:
    """Refuse anything but a float."""
    if not isinstance(value, float):
        raise ValueError(f"{name} must be a number, found {short(value)}")


def require_hash(name: str, value: Any) -> None:
    """Refuse anything but a sha256 in lower-case hex."""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"{name} must be a sha256 in 64 hex digits, found {short(value)}")


def require_section(name: str, value: Any) -> None:
    """Refuse anything but a JSON object."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a section of keys, found {short(value)}")


def require_list(name: str, value: Any) -> None:
    """Refuse anything but a JSON list."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, found {short(value)}")


def require_fields(name: str, value: Any, kind: type) -> None:
    """Refuse anything but a JSON object with exactly the fields of a dataclass."""
    wanted = _field_names(kind)
    if isinstance(value, dict) and value.keys() == wanted:
        return
    require_section(name, value)
    for missing in sorted(wanted - value.keys()):
        raise ValueError(f"{name} has no field {missing}")
    for unknown in sorted(value.keys() - wanted):
        raise ValueError(f"{name} has an unknown field {short(unknown)}")


@cache
def _field_names(kind: type) -> frozenset[str]:
    return frozenset(item.name for item in fields(kind))


def short(value: Any) -> str:
    """Write a value as an error shows it: short."""
    return reprlib.repr(value)
