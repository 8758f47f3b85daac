"""Rows as Arrow tables: for looking at a store, and for every tool that reads Arrow or Parquet.

Data path: `StoreReader` or `SequenceBatch` -> **one line per target row** -> pyarrow, Parquet, duckdb, polars.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.errors import UsageError
from storage.files import storage_errors
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.segments import row_starts

SEQUENCES_PER_BATCH = 64


def schema() -> pa.Schema:
    """Return the columns: one line per target row, no half floats (duckdb has none).

    document, sequence (number in the split), position (of the row's token in its sequence), token and next_token (ids
    there and after it), ids (head in falling probability, then tail samples), logprob (of the head's ids, nats),
    head_size, counts (of the tail's ids), tail_mass (probability outside of the head), entropy (nats), next_logprob
    (teacher log-probability of next_token).
    """
    return pa.schema(
        [
            ("document", pa.int64()),
            ("sequence", pa.int64()),
            ("position", pa.int32()),
            ("token", pa.uint32()),
            ("next_token", pa.uint32()),
            ("ids", pa.list_(pa.uint32())),
            ("logprob", pa.list_(pa.float32())),
            ("head_size", pa.int32()),
            ("counts", pa.list_(pa.uint16())),
            ("tail_mass", pa.float32()),
            ("entropy", pa.float32()),
            ("next_logprob", pa.float32()),
        ]
    )


def to_table(source: SequenceBatch | StoreReader, *, first_sequence: int = 0) -> pa.Table:
    """Return all rows of a batch, or of a reader's split, as a table in memory.

    Args:
        source: what to convert. For a large store use `record_batches`.
        first_sequence: number given to the first sequence of a batch.
    """
    if isinstance(source, StoreReader):
        return record_batches(source).read_all()
    return pa.Table.from_batches([_record_batch(source, first_sequence)], schema=schema())


def record_batches(reader: StoreReader, *, sequences_per_batch: int = SEQUENCES_PER_BATCH) -> pa.RecordBatchReader:
    """Return the rows of a reader's split as a stream of record batches; it holds one at a time.

    The result has `__arrow_c_stream__`, so duckdb and polars read it without a copy.
    """
    return pa.RecordBatchReader.from_batches(schema(), _batches(reader, sequences_per_batch))


def _batches(reader: StoreReader, step: int) -> Iterator[pa.RecordBatch]:
    for first in range(0, len(reader), step):
        yield _record_batch(reader.read(range(first, min(first + step, len(reader)))), first)


def to_parquet(rows: StoreReader | Iterable[pa.RecordBatch], path: str | os.PathLike[str]) -> int:
    """Write the rows of a reader's split, or batches of them, into one Parquet file (zstd); return their number.

    Raises:
        UsageError: the file exists.
        OutOfSpaceError, StorageUnavailableError: it cannot be written; no partial file stays behind.
    """
    target = Path(path)
    if target.exists():
        raise UsageError("the file exists already", where=str(target), fix="name another file")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        with storage_errors(target), pq.ParquetWriter(partial, schema(), compression="zstd") as writer:
            batches = record_batches(rows) if isinstance(rows, StoreReader) else rows
            written = 0
            for batch in batches:
                writer.write_batch(batch)
                written += int(batch.num_rows)
        with storage_errors(target):
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return written


def _record_batch(batch: SequenceBatch, first_sequence: int) -> pa.RecordBatch:
    token_R = np.flatnonzero(batch.has_row)
    sequence_R = np.repeat(np.arange(len(batch)), np.diff(batch.row_offset))
    columns = [
        batch.document[sequence_R],
        sequence_R + first_sequence,
        (token_R - batch.token_offset[sequence_R]).astype(np.int32),
        batch.tokens[token_R],
        batch.tokens[token_R + 1],
        _joined_ids(batch),
        _lists(batch.logprob, batch.head_size),
        batch.head_size,
        _lists(batch.count, batch.tail_size),
        np.exp(-np.logaddexp(0.0, -batch.tail_logit.astype(np.float64))).astype(np.float32),
        batch.entropy,
        batch.next_logprob,
    ]
    return pa.record_batch(
        [column if isinstance(column, pa.Array) else pa.array(column) for column in columns], schema()
    )


def _lists(values: NDArray[np.generic], size_R: NDArray[np.int32]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(row_starts(size_R).astype(np.int32)), pa.array(values))


def _joined_ids(batch: SequenceBatch) -> pa.ListArray:
    """Lists of each row's head ids, then its tail ids."""
    head_start, tail_start = row_starts(batch.head_size), row_starts(batch.tail_size)
    ids = np.empty(len(batch.head_ids) + len(batch.tail_ids), dtype=np.uint32)
    ids[np.arange(len(batch.head_ids)) + np.repeat(tail_start[:-1], batch.head_size)] = batch.head_ids
    ids[np.arange(len(batch.tail_ids)) + np.repeat(head_start[1:], batch.tail_size)] = batch.tail_ids
    return _lists(ids, batch.head_size + batch.tail_size)
