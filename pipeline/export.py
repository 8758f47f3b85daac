"""Rows of a store -> an Arrow, Parquet or JSON file, for every tool that is not ours.

Data path: store -> `StoreReader` -> `storage.arrow` -> **file or stdout**. One batch is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from storage.arrow import record_batches, schema, to_parquet, to_table
from storage.errors import UsageError
from storage.files import storage_errors
from storage.reader import StoreReader

Format = Literal["text", "arrow", "parquet", "json"]


def export_rows(
    reader: StoreReader, form: Format, output: Path | None, *, sequences: Sequence[int] | None = None
) -> int:
    """Write rows, one line or record per target row, with the columns of `storage.arrow.schema()`.

    Args:
        reader: the store.
        form: arrow (IPC file), parquet (zstd), json (one object per line; what is not finite becomes null). Text is
            for the terminal only and refused.
        output: a file that does not exist yet; None: stdout, for json only.
        sequences: numbers of the sequences wanted; None: all of the split.

    Returns:
        The number of rows written.

    Raises:
        UsageError: the file exists, a binary form has no file, or the form is text.
        OutOfSpaceError, StorageUnavailableError: it cannot be written; no partial file stays behind.
    """
    if form == "text":
        raise UsageError("text goes to the terminal only", where="--output", fix="add --format json, arrow or parquet")
    batches = record_batches(reader) if sequences is None else _chosen(reader, sequences)
    if output is None:
        if form != "json":
            raise UsageError(f"{form} is a binary form", where="--format", fix="name a file with --output FILE")
        return _write_json(batches, sys.stdout.buffer)
    if form == "parquet":
        return to_parquet(batches, output)
    with _whole_file(output) as file:
        if form == "json":
            return _write_json(batches, file)
        with pa.ipc.new_file(file, schema()) as writer:
            return sum(_written(writer, batch) for batch in batches)


def _chosen(reader: StoreReader, sequences: Sequence[int]) -> Iterator[pa.RecordBatch]:
    for number in sequences:
        yield from to_table(reader.read([number]), first_sequence=number).to_batches()


def _written(writer: Any, batch: pa.RecordBatch) -> int:
    writer.write_batch(batch)
    return int(batch.num_rows)


def _write_json(batches: Iterator[pa.RecordBatch], file: BinaryIO) -> int:
    rows = 0
    for batch in batches:
        for row in batch.to_pylist():
            file.write(json.dumps({name: _finite(value) for name, value in row.items()}).encode() + b"\n")
        rows += batch.num_rows
    file.flush()
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _whole_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it is complete."""
    if target.exists():
        raise UsageError("the file exists already", where=str(target), fix="name another file with --output")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    with storage_errors(target):
        try:
            with partial.open("xb") as file:
                yield file
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
