"""metrics.jsonl: one JSON object per line, appended as training goes.

Two kinds of line, told by `event`:

    {"event": "step", "step", "loss", "kd", "ce", "kd_ratio", "lr", "grad_norm", "tokens", "rows", "seconds",
     "tokens_per_second"}
    {"event": "validation", "step", "loss", "kd", "ce", "rows", "seconds"}

`loss`, `kd` and `ce` are means per target row in nats; a part that was not computed is null. `kd_ratio`, `tokens` and
`rows` are those of the step. `seconds` and `tokens_per_second` measure time; every other field is a function of
configuration and store, so the curve of a run that was stopped and resumed equals an undisturbed one's in them to the
last digit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stages.durable import replace_file
from storage.errors import UsageError, storage_errors
from storage.files.regular import open_regular
from storage.values import is_amount, is_whole, parse_json, short

LONGEST_LINE = 1 << 16  # bytes; a line has a dozen numbers


class MetricsLog:
    """Appends to metrics.jsonl. A context manager.

    Args:
        path: of the file; created if missing.
        last_step: lines of later steps, and a torn last line, are dropped first: the run resumes after this step.

    Attributes:
        validated: step of the last validation in it, 0 if there is none.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        with storage_errors(path):
            kept = _whole_lines(path, last_step=last_step)
            replace_file(path, b"".join(line for line, _ in kept))
            self._file = open(path, "ab")  # noqa: SIM115  # closed in __exit__
        self._path = path
        self.validated = max((int(record["step"]) for _, record in kept if record["event"] == "validation"), default=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, record: Mapping[str, str | int | float | None]) -> None:
        """Append one line and hand it to the operating system."""
        with storage_errors(self._path):
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Wait until every line is on the disk: a checkpoint must never be ahead of its curve."""
        with storage_errors(self._path):
            os.fsync(self._file.fileno())


class NoMetricsLog:
    """In a process that is not the main one: the same methods, nothing written."""

    validated = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close nothing: nothing was opened."""

    def write(self, record: Mapping[str, str | int | float | None]) -> None:
        """Drop it: the main process writes the same."""

    def sync(self) -> None:
        """Wait for nothing."""


Metrics = MetricsLog | NoMetricsLog


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a metrics.jsonl: `event`, `step`, and numbers or null by name.

    Raises:
        UsageError: a line is damaged, and it is not the end that a power failure tore.
    """
    return [record for _, record in _whole_lines(path)]


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, cut where they are longer than any of ours."""
    with storage_errors(path), suppress(FileNotFoundError), open_regular(path) as file:
        while line := file.readline(LONGEST_LINE):
            yield line


def _whole_lines(path: Path, *, last_step: float = math.inf) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of steps up to `last_step` that stand before the first line that is not whole.

    A power failure may leave zeros at the end, and lines behind them; none of what was synced is among those.

    Raises:
        UsageError: a line of such a step stands behind one that is not whole, or holds what training never writes.
    """
    whole: list[tuple[bytes, dict[str, Any]]] = []
    torn: int | None = None  # the first line that is not whole
    for number, line in enumerate(_lines(path), 1):
        record = _record(line)
        problem = None if record is None else _problem(record)
        if record is None:
            torn = torn or number
        elif torn is None and problem is None:
            whole.append((line, record))
        elif torn is None:
            raise _damaged(path, f"line {number} {problem}")
        elif problem is None and record["step"] <= last_step:
            raise _damaged(path, f"line {torn} is not a whole JSON object")
    return [(line, record) for line, record in whole if record["step"] <= last_step]


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(what, where=str(path), fix="restore the file, or choose another run directory")


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds; None if it is not a whole JSON object."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None


def _problem(record: Mapping[str, Any]) -> str | None:
    """Say what no line that training writes holds."""
    if not (is_whole(record.get("step")) and isinstance(record.get("event"), str)):
        return "has no event or no step"
    values = {key: value for key, value in record.items() if key != "event" and value is not None}
    wrong = next((key for key, value in values.items() if not is_amount(value)), None)
    return None if wrong is None else f"has no number at {wrong}: {short(record[wrong])}"
