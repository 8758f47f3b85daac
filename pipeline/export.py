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
from typing import Any, BinaryIO, Literal, get_args

import pyarrow as pa

from storage.errors import UsageError
from storage.exchange.arrow import SEQUENCES_PER_BATCH, record_batches, to_parquet
from storage.exchange.jsonl import sequence_lines
from storage.files import whole_file
from storage.reader import StoreReader

FileFormat = Literal["parquet", "arrow", "jsonl", "row-jsonl"]
Format = Literal["text"] | FileFormat
TEXT_FORMS: tuple[FileFormat, ...] = ("jsonl", "row-jsonl")  # these may go to stdout


def form_of(output: Path) -> FileFormat:
    """Return the form that a file's name stands for. Raises UsageError if it stands for none."""
    forms: tuple[FileFormat, ...] = get_args(FileFormat)
    for form in forms:
        if output.suffix == f".{form}":
            return form
    raise UsageError(
        f"the name does not tell the form: {output.name} ends in none of {', '.join(f'.{form}' for form in forms)}",
        where=str(output),
        fix=f"add --to {' or '.join(forms)}",
    )


def export_store(
    reader: StoreReader, form: FileFormat, output: Path | None, *, sequences: Sequence[int] | None = None
) -> int:
    """Write a split of a store into a file, or to stdout.

    Args:
        form: parquet (zstd) and arrow (IPC file) have one line per target row, columns as in
            `storage.exchange.arrow.schema`; row-jsonl has the same as one JSON object per line, null for what is not
            finite; jsonl has one line per sequence, as in `storage.exchange.jsonl`.
        output: a file that does not exist yet; None: stdout, for jsonl and row-jsonl.
        sequences: numbers of the sequences wanted; None: all of the split.

    Returns:
        The number of target rows written.

    Raises:
        UsageError: the file exists, or a binary form has no file.
        CorruptionError: the store is damaged.
        OutOfSpaceError, StorageUnavailableError: it cannot be written. No partial file stays behind in any case.
    """
    numbers = range(len(reader)) if sequences is None else sequences
    if output is None:
        if form not in TEXT_FORMS:
            raise UsageError(f"{form} is a binary form", where="--format", fix="name a file with --output FILE")
        return _write(reader, form, numbers, sys.stdout.buffer)
    if form == "parquet":
        return to_parquet(record_batches(reader, sequences=numbers), output)
    with whole_file(output) as file:
        return _write(reader, form, numbers, file)


def _write(reader: StoreReader, form: FileFormat, numbers: Sequence[int], file: BinaryIO) -> int:
    if form == "jsonl":
        rows = sum(_write_sequences(reader, part, file) for part in _parts(numbers))
    else:
        batches = record_batches(reader, sequences=numbers)
        if form == "arrow":
            with pa.ipc.new_file(file, batches.schema) as writer:
                return sum(_written(writer, batch) for batch in batches)
        rows = _write_rows(batches, file)
    file.flush()
    return rows


def _parts(sequences: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(sequences), SEQUENCES_PER_BATCH):
        yield sequences[first : first + SEQUENCES_PER_BATCH]


def _write_sequences(reader: StoreReader, numbers: Sequence[int], file: BinaryIO) -> int:
    batch = reader.read(numbers)
    target = reader.plan.target  # heads that end at a mass p differ in length
    file.writelines(sequence_lines(batch, numbers=numbers, padding=target.k if target.p is None else 0))
    return batch.rows


def _written(writer: Any, batch: pa.RecordBatch) -> int:
    writer.write_batch(batch)
    return int(batch.num_rows)


def _write_rows(batches: Iterator[pa.RecordBatch], file: BinaryIO) -> int:
    rows = 0
    for batch in batches:
        for row in batch.to_pylist():
            file.write(json.dumps({name: _finite(value) for name, value in row.items()}).encode() + b"\n")
        rows += batch.num_rows
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
