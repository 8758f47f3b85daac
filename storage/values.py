"""JSON values of a store: their one form as bytes, their hash, and what may stand in a field.

Data path: plan.json -> **values of the right types** -> `Plan`. Each `require_*` raises ValueError, naming the field.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

Json = Any  # a JSON value: dict, list, str, int, float, bool or None
LARGEST_DEPTH = 64  # of objects and lists inside each other: what reads a value goes as deep as it does
_LARGEST_EXACT = 1 << 53  # whole numbers up to this are floats without rounding
_HASH = re.compile("[0-9a-f]{64}")


def canonical_json(value: Json) -> bytes:
    """Return the one byte string of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def parse_json(data: bytes) -> Json:
    """Return the JSON value in bytes that anyone may have written. Raises ValueError, also for deep nesting."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(LARGEST_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    if level:
        raise ValueError(f"it is nested deeper than {LARGEST_DEPTH} objects and lists")
    return value


def _inside(outer: Json) -> Iterable[Json]:
    return outer.values() if isinstance(outer, dict) else outer


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def json_differences(stored: Json, wanted: Json, path: str = "") -> list[str]:
    """Return a line for each place in which two JSON values differ: `path: stored -> wanted`."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(stored.keys() | wanted.keys())
            for line in json_differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        pairs = enumerate(zip(stored, wanted, strict=True))
        return [line for index, pair in pairs for line in json_differences(*pair, f"{path}[{index}]")]
    return [] if stored == wanted else [f"{path}: {stored!r} -> {wanted!r}"]


def as_float(value: Any) -> Any:
    """Return a whole number as the float it is, for fields where 1 and 1.0 mean the same; anything else as it is."""
    return float(value) if type(value) is int and abs(value) <= _LARGEST_EXACT else value


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
