"""Rows of a store -> a Parquet, Arrow or JSON file, for every tool that is not ours.

Data path: store -> `StoreReader` -> `storage.exchange.arrow`, `storage.exchange.jsonl` -> **file or stdout**. One
batch is in memory at a time, and a file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from storage.errors import UsageError
from storage.exchange.arrow import SEQUENCES_PER_BATCH, record_batches, to_parquet
from storage.exchange.jsonl import sequence_lines
from storage.files import whole_file
from storage.reader import StoreReader

Format = Literal["text", "arrow", "parquet", "json"]
FileFormat = Literal["arrow", "parquet", "jsonl"]


def form_of(output: Path) -> FileFormat:
    """Return the form that a file's name stands for. Raises UsageError if it stands for none."""
    forms: tuple[FileFormat, ...] = ("parquet", "arrow", "jsonl")
    for form in forms:
        if output.suffix == f".{form}":
            return form
    raise UsageError(
        f"the name does not tell the form: {output.name} ends in none of {', '.join(f'.{form}' for form in forms)}",
        where=str(output),
        fix="add --to parquet, arrow or jsonl",
    )


def export_store(reader: StoreReader, output: Path, form: FileFormat, *, limit: int | None = None) -> int:
    """Write a split of a store into a file.

    Args:
        reader: the store.
        output: a file that does not exist yet.
        form: parquet (zstd) and arrow (IPC file) have one line per target row, columns as in
            `storage.exchange.arrow.schema`; jsonl has one line per sequence, as in `storage.exchange.jsonl`.
        limit: only the first so many sequences; None: all.

    Returns:
        The number of target rows written.

    Raises:
        UsageError: the file exists.
        CorruptionError: the store is damaged.
        OutOfSpaceError, StorageUnavailableError: it cannot be written. No partial file stays behind in any case.
    """
    sequences = range(len(reader) if limit is None else min(limit, len(reader)))
    if form != "jsonl":
        return export_rows(reader, form, output, sequences=sequences)
    with whole_file(output) as file:
        return sum(_write_sequences(reader, numbers, file) for numbers in _parts(sequences))


def export_rows(
    reader: StoreReader, form: Format, output: Path | None, *, sequences: Sequence[int] | None = None
) -> int:
    """Write rows, one line or record per target row, with the columns of `storage.exchange.arrow.schema()`.

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
    batches = record_batches(reader, sequences=sequences)
    if output is None:
        if form != "json":
            raise UsageError(f"{form} is a binary form", where="--format", fix="name a file with --output FILE")
        return _write_json(batches, sys.stdout.buffer)
    if form == "parquet":
        return to_parquet(batches, output)
    with whole_file(output) as file:
        if form == "json":
            return _write_json(batches, file)
        with pa.ipc.new_file(file, batches.schema) as writer:
            return sum(_written(writer, batch) for batch in batches)


def _parts(sequences: range) -> Iterator[range]:
    for first in range(0, len(sequences), SEQUENCES_PER_BATCH):
        yield sequences[first : first + SEQUENCES_PER_BATCH]


def _write_sequences(reader: StoreReader, numbers: range, file: BinaryIO) -> int:
    batch = reader.read(numbers)
    same_size = reader.plan.target.kind in ("topk", "hybrid")
    file.writelines(sequence_lines(batch, numbers=numbers, padding=reader.plan.target.k if same_size else 0))
    return batch.rows


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
