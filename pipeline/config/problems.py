"""Validation errors of pydantic -> one `UsageError` in the words of the configuration file.

pydantic reports one error per branch of a union and names Python types. A user needs file and line, the key, what was
found, every value that would do, and for an unknown key the one that was probably meant.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from pipeline.config.base import PATTERNS, FieldError
from pipeline.config.hints import hint
from pipeline.config.overrides import dotted
from stages.yaml_text import KeyPath
from storage.errors import UsageError

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "model": "a section of keys",
    "dict": "a section of keys",
    "tuple": "a list (each item on its own line after `- `)",
    "finite": "a finite number",
}


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """Where the values of a configuration came from.

    Attributes:
        name: the file.
        lines: line of each key, by path.
        origins: `--set` argument that set a path, by path.
        values: the values that were validated.
    """

    name: str
    lines: Mapping[KeyPath, int]
    origins: Mapping[KeyPath, str]
    values: Mapping[str, Any]

    def where(self, path: KeyPath) -> str:
        """Return the `file:line` or `--set` argument that set `path`, or else the section around it."""
        prefixes = [path[:length] for length in range(len(path), -1, -1)]
        for prefix in prefixes:
            if prefix in self.origins:
                return self.origins[prefix]
        for prefix in prefixes:
            if prefix not in self.lines and (inside := self._set_inside(prefix)) is not None:
                return inside
            if prefix and prefix in self.lines:
                return f"{self.name}:{self.lines[prefix]}"
        return self.name

    def _set_inside(self, path: KeyPath) -> str | None:
        return next((origin for other, origin in self.origins.items() if other[: len(path)] == path), None)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """One thing to put right. Low ranks are told first: a misspelt key often explains the one that is missing."""

    path: KeyPath
    rank: int
    what: str
    fix: str | None


def explain(error: ValidationError, model: type[BaseModel], source: ConfigSource) -> UsageError:
    """Turn a validation error into the problem to put right first, with a pointer to the others."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        cause = details.get("ctx", {}).get("error")
        below = cause.path if isinstance(cause, FieldError) else ()
        groups.setdefault(_path_in_file((*details["loc"], *below), source.values), []).append(details)
    for path in [path for path, group in groups.items() if group[0]["type"] == "too_short"]:
        if any(other[: len(path)] == path != other for other in groups):
            del groups[path]  # pydantic counts a faulty item as an absent one
    found = [_problem(path, group, model) for path, group in groups.items()]
    found.sort(key=lambda problem: (problem.rank, _line(problem.path, source), dotted(problem.path)))
    first, *others = found
    fix = first.fix
    if others:
        more = f"{len(others)} more: " + ", ".join(dotted(problem.path) for problem in others)
        fix = more if fix is None else f"{fix}\n     then {more}"
    return UsageError(first.what, where=source.where(first.path), fix=fix)


def _line(path: KeyPath, source: ConfigSource) -> int:
    return next((source.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in source.lines), 0)


def _path_in_file(location: Sequence[str | int], values: Any) -> KeyPath:
    """Drop the names of union branches that pydantic puts into a location."""
    path: list[str | int] = []
    for part in location:
        if isinstance(values, Mapping) and isinstance(part, str):
            path.append(part)
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            path.append(part)
            values = values[part] if part < len(values) else None
    return tuple(path)


def _problem(path: KeyPath, group: Sequence[ErrorDetails], model: type[BaseModel]) -> _Problem:
    details, key = group[0], dotted(path)
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, model)
    if kind == "missing":
        return _Problem(path=path, rank=2, what=f"{key} is missing", fix=_describe(path, model))
    if kind == "value_error":
        reason = details.get("ctx", {}).get("error", details["msg"])
        if isinstance(reason, FieldError):
            return _Problem(path=path, rank=1, what=reason.what, fix=reason.fix)
        return _Problem(path=path, rank=1, what=f"{key}: {reason}" if key else str(reason), fix=None)
    expected = " or ".join(dict.fromkeys(_expected(item) for item in group))
    what = f"{key}: expected {expected}, found {shown(details['input'])}"
    return _Problem(path=path, rank=1, what=what, fix=_describe(path, model))


def _expected(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    for name, words in (
        ("greater_than", "a number above"),
        ("greater_than_equal", "a number of at least"),
        ("less_than", "a number below"),
        ("less_than_equal", "a number of at most"),
    ):
        if kind == name:
            limit = next(iter(context.values()))
            return f"{words} {limit:g}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(context["pattern"], f"text of the form {context['pattern']}")
    if kind == "too_short":
        return f"at least {context['min_length']} item"
    if kind == "too_long":
        return f"at most {context['max_length']} items"
    return _EXPECTED.get(kind.split("_")[0], details["msg"])


def shown(value: Any) -> str:
    """Write a value as an error shows it: short, in the words of YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a section of keys"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown_key(path: KeyPath, model: type[BaseModel]) -> _Problem:
    section, key = path[:-1], str(path[-1])
    owner = _model_at(model, section)
    valid = [] if owner is None else list(owner.model_fields)
    what = f"unknown key {key!r}" + (f" in {dotted(section)}" if section else "")
    elsewhere = [dotted(other) for other in _all_keys(model) if other[-1] == key]
    known = hint(key, dotted(section), training="student" in model.model_fields)
    return _Problem(path=path, rank=0, what=what, fix=known or right_key(key, valid, elsewhere))


def right_key(key: str, valid: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """Suggest what to write instead of an unknown key: one like it, the section it belongs to, or the known keys."""
    nearest = difflib.get_close_matches(key, valid, n=1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return f"{key!r} belongs at {' or '.join(elsewhere)}" if elsewhere else f"keys here: {', '.join(valid)}"


def _describe(path: KeyPath, model: type[BaseModel]) -> str | None:
    """Return the documentation of a key, with its default: what the reader of an error would look up next."""
    owner = _model_at(model, path[:-1])
    field = None if owner is None or not path else owner.model_fields.get(str(path[-1]))
    if field is None or field.description is None:
        return None
    text = f"{dotted(path)}: " + " ".join(field.description.split()).rstrip(".")
    if field.default in (PydanticUndefined, None) or isinstance(field.default, BaseModel):
        return text
    default = field.default if isinstance(field.default, str) else json.dumps(field.default, default=str)
    return f"{text} (default {default})"


def _model_at(model: type[BaseModel], section: KeyPath) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in section:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = None if field is None else _model_of(field)
    return current


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a field holds, alone or in a list."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _all_keys(model: type[BaseModel], section: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        yield (*section, name)
        inner = _model_of(field)
        if inner is not None:
            yield from _all_keys(inner, (*section, name))
