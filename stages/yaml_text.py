"""YAML text -> plain values with the line each key stands on. Bounded, and unable to run or build anything.

Stands between a configuration file, of a user or of a run, and whoever reads it. Differences from PyYAML's `safe_load`,
all of them wanted in a configuration: scalars follow the YAML 1.2 core schema (3e-4 is a number, `no` and dates are
text), a key given twice is an error, anchors and aliases are refused (an alias bomb needs them), and size and depth are
limited.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from storage.errors import UsageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the root."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """Values of one YAML document.

    Attributes:
        values: dict, list, str, int, float, bool or None, nested.
        lines: line (from 1) of each key or list item, by path.
    """

    values: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader that resolves plain scalars by the YAML 1.2 core schema (plus 1_000 for readable counts)."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way of naming the table


_FLOAT = (
    r"([-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))"
)
_SCALARS = (  # type, pattern, characters it can begin with
    ("null", r"(~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"([-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)", list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
)
for _name, _pattern, _first in _SCALARS:
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^{_pattern}$"), _first)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either version of YAML, 1.1 or 1.2, would take for a number."""


_PlainDumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{_FLOAT}$"), list("-+0123456789."))


def write_yaml(values: dict[str, Any]) -> bytes:
    """Return plain values as a YAML document that `parse` reads as they are, and any other reader as well."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False).encode()


def parse(text: str, *, name: str) -> Located:
    """Read one YAML document.

    Args:
        text: the document; a user's has at most MAX_BYTES.
        name: file name or argument, for messages.

    Raises:
        UsageError: the text is too deep, not YAML, holds a key twice, an anchor, a tag, or a key that is
            not text.
    """
    try:
        _check_shape(text, name)
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        values = None if node is None else _build(loader, node, (), lines, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}, column {mark.column + 1}"
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"not valid YAML: {problem}", where=where, fix=_syntax_advice(problem)) from error
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise UsageError(f"not valid YAML: {what}", where=name, fix="save the file as plain UTF-8 text") from error
    return Located(values=values, lines=lines)


def _syntax_advice(problem: str) -> str:
    if r"'\t'" in problem:
        return "indent with spaces: YAML does not allow tabs"
    return "check indentation, the space after each colon, and quotes around text that holds ': ' or ' #'"


def _check_shape(text: str, name: str) -> None:
    """Refuse anchors, aliases, tags and deep nesting on the event stream, before anything recursive reads the text."""
    depth = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        where = name if event.start_mark is None else f"{name}:{event.start_mark.line + 1}"
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            raise UsageError(
                f"anchors and aliases are not supported, found {anchor!r}",
                where=where,
                fix="write the value out; in front of text, put quotes around a leading & or *",
            )
        if tag is not None:
            raise UsageError(f"tags are not supported, found {tag!r}", where=where, fix="leave the tag out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UsageError(f"nested deeper than {MAX_DEPTH} levels", where=where)


def _build(loader: _CoreLoader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, lines, name)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, index), lines, name) for index, item in enumerate(node.value)]
    return _scalar(loader, node, name)


def _scalar(loader: _CoreLoader, node: yaml.Node, name: str) -> Any:
    where = f"{name}:{node.start_mark.line + 1}"
    try:
        value = loader.construct_object(node)
    except ValueError as error:  # a number with more digits than Python reads
        raise UsageError(f"not a number: {error}", where=where) from error
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError("half of a surrogate pair is not a character", where=where, fix="write the character itself")
    return value


def _build_mapping(
    loader: _CoreLoader, node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], name: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(loader, key_node, name) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise UsageError(f"keys must be text, found {key!r}", where=f"{name}:{line}", fix="put the key in quotes")
        if key in values:
            raise UsageError(
                f"key {key!r} is given twice, first on line {lines[*path, key]}",
                where=f"{name}:{line}",
                fix="keep one of the two",
            )
        lines[*path, key] = line
        values[key] = _build(loader, value_node, (*path, key), lines, name)
    return values
