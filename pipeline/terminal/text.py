"""Text on the terminal: lines, facts in two columns, JSON, and numbers as people read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click


def write(text: str = "", *, err: bool = False, bold: bool = False) -> None:
    """Write a line of text; `err`: to stderr, where what is not a result goes."""
    click.secho(text, err=err, bold=bold)


def print_json(value: Any) -> None:
    """Write a value, dataclasses and paths included, as one JSON document."""
    click.echo(json.dumps(to_json(value), indent=2, ensure_ascii=False))


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
        click.echo(f"{click.style(name.ljust(width), dim=True)}  {value}")


def quoted(text: str) -> str:
    """Quote text so that white space and control characters show."""
    return json.dumps(text, ensure_ascii=False)


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
