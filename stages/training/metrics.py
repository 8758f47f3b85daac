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
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from stages.durable import replace_file
from storage.errors import UsageError, storage_errors
from storage.files.regular import open_regular

LONGEST_LINE = 1 << 16  # bytes


class MetricsLog:
    """Appends to metrics.jsonl. A context manager.

    Args:
        path: of the file; created if missing.
        last_step: lines of later steps, and a torn last line, are dropped first: the run resumes after this step.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        with storage_errors(path):
            kept = _lines_until(path, last_step)
            replace_file(path, b"".join(kept))
            self._file = open(path, "ab")  # noqa: SIM115  # closed in __exit__
        self._path = path

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


def read_metrics(path: Path) -> list[dict[str, str | int | float | None]]:
    """Return all whole lines of a metrics.jsonl.

    Raises:
        UsageError: a line has no event or no step.
    """
    return [json.loads(line) for line in _whole_lines(path)]


def _lines_until(path: Path, last_step: int) -> list[bytes]:
    return [line for line in _whole_lines(path) if json.loads(line)["step"] <= last_step]


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, cut where they are longer than any of ours."""
    with storage_errors(path), suppress(FileNotFoundError), open_regular(path) as file:
        while line := file.readline(LONGEST_LINE):
            yield line


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines up to the first that is not a whole JSON object: a power failure may leave zeros at the end."""
    whole: list[bytes] = []
    for line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not (line.endswith(b"\n") and isinstance(record, dict)):
            break
        if not (isinstance(record.get("step"), int) and isinstance(record.get("event"), str)):
            raise UsageError(
                f"line {len(whole) + 1} has no event or no step",
                where=str(path),
                fix="restore the file, or choose another run directory",
            )
        whole.append(line)
    return whole
