"""`--set section.key=value`: command line values laid over those of a configuration file, before validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.yaml_text import KeyPath, parse
from storage.errors import UsageError


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[KeyPath, str]:
    """Lay each `path=value` over `values`, in order and in place.

    A path is keys joined by dots, with list indices as numbers (`corpus.0.path`). A value is read as YAML, so
    `3e-4` is a number, `null` is nothing and `[1, 2]` a list. Sections that are not there yet are made.

    Returns:
        The argument that set each path, for messages.

    Raises:
        UsageError: an argument has no `=` or no path, a value is not YAML, or a path goes through a plain value or
            beyond the end of a list.
    """
    origins: dict[KeyPath, str] = {}
    for argument in overrides:
        name = f"--set {argument}"
        keys, separator, text = argument.partition("=")
        parts = keys.strip().split(".")
        if not separator or not all(parts):
            raise UsageError("expected section.key=value", where=name, fix="for example --set target.k=64")
        path = _set(values, parts, parse(text, name=name).values, name)
        origins = {other: origin for other, origin in origins.items() if other[: len(path)] != path}
        origins[path] = name
    return origins


def _set(values: dict[str, Any], parts: list[str], value: Any, name: str) -> KeyPath:
    """Set one value, making the sections on the way to it."""
    container: Any = values
    path: KeyPath = ()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        key = _key_in(container, part, path, name)
        path = (*path, key)
        if following is None:
            container[key] = value
        elif isinstance(container, dict) and container.get(part) is None:
            container[part] = {}
        container = container[key]
    return path


def _key_in(container: Any, part: str, path: KeyPath, name: str) -> str | int:
    here = dotted(path)
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise UsageError(f"{here} is a plain value ({container!r}), so it has no {part!r}", where=name)
    if not (part.isascii() and part.isdigit() and int(part) < len(container)):
        raise UsageError(
            f"{here} is a list of {len(container)}, found index {part!r}",
            where=name,
            fix=f"use an index from 0 to {len(container) - 1}" if container else f"set {here} as a whole",
        )
    return int(part)


def dotted(path: KeyPath) -> str:
    """Write a path as `--set` takes it: `corpus.0.path`."""
    return ".".join(str(part) for part in path)
