"""Text on the terminal: lines, facts in two columns, JSON, and numbers as people read them.

All text goes through `write` or `print_json`, which make it printable before they style it: what comes from a store, a
corpus, a model or a file's name cannot style, move or forge anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.runtime import printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Styled:
    """A part of a line with a style of its own; None leaves a property as it is."""

    text: str
    fg: str | None = None
    bold: bool | None = None
    dim: bool | None = None
    underline: bool | None = None


def write(*parts: str | Styled, err: bool = False, lines: bool = False) -> None:
    """Write a line of text from its parts.

    Args:
        err: to stderr, where what is not a result goes.
        lines: line ends in it are meant.
    """
    click.echo("".join(_shown(part, lines=lines) for part in parts), err=err)


def _shown(part: str | Styled, *, lines: bool) -> str:
    if isinstance(part, str):
        return printable(part, lines=lines)
    style = {name: value for name, value in vars(part).items() if name != "text"}
    return click.style(printable(part.text, lines=lines), **style)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Write a value, dataclasses and paths included, as one JSON document."""
    click.echo(printable(json.dumps(to_json(value), indent=indent, ensure_ascii=False), lines=True))


def to_json(value: Any) -> Any:
    """Turn dataclasses, mappings, sequences and paths into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Write name and value pairs in two columns."""
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        write(Styled(text=name.ljust(width), dim=True), f"  {value}")


def quoted(text: str) -> str:
    """Quote text so that white space and control characters show."""
    return printable(json.dumps(text, ensure_ascii=False))


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: 1 shard, 2 shards."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_line(size: int, per_row: float | None) -> str:
    """Write a size in a fitting unit, with bytes per row if known."""
    return bytes_text(size) + ("" if per_row is None else f", {per_row:.1f} bytes per row")


def bytes_text(size: float) -> str:
    """Write a number of bytes in a fitting decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def duration_text(seconds: float) -> str:
    """Write a duration as people say it: 42 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
