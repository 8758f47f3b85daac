"""Rows as Arrow tables: for looking at a store, and for every tool that reads Arrow or Parquet.

Data path: `StoreReader` or `SequenceBatch` -> **one line per target row** -> pyarrow, Parquet, duckdb, polars.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage.files import whole_file
from storage.plan import COLUMN_AXES
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.segments import interleave, row_starts, sigmoid

SEQUENCES_PER_BATCH = 64

# Few values repeat often enough in log-probabilities for a dictionary to pay; their bytes, split by significance,
# compress better. On rows of a real teacher the file is a third smaller and written twice as fast.
_DICTIONARY = [
    "document",
    "sequence",
    "token",
    "next_token",
    "ids.list.element",
    "head_size",
    "counts.list.element",
    "temperatures.list.element",
]
_SPLIT = {"logprob.list.element": "BYTE_STREAM_SPLIT"}


def schema(columns: Mapping[str, Mapping[str, str]] | None = None) -> pa.Schema:
    """Return the columns: one line per target row, no half floats (duckdb does not read them).

    document, sequence (number in the split), position (of the row's token in its sequence), token and next_token (ids
    there and after it), ids (head in falling probability, then tail samples), logprob (of the head's ids, nats),
    head_size, counts (of the tail's ids), tail_mass (probability outside of the head), entropy (nats), next_logprob
    (teacher log-probability of next_token), temperatures (of the store, other than 1), tail_mass_T and entropy_T (at
    each of those; empty if the store holds none).

    Args:
        columns: the plan's added columns. They follow: those of rows, then those of sequences, repeated on each row.
    """
    kinds = {"float16": pa.float32(), "float32": pa.float32()}
    added = [
        (name, kinds.get(about["dtype"], about["dtype"]))
        for axis in COLUMN_AXES
        for name, about in (columns or {}).items()
        if about["axis"] == axis
    ]
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
            ("temperatures", pa.list_(pa.float32())),
            ("tail_mass_T", pa.list_(pa.float32())),
            ("entropy_T", pa.list_(pa.float32())),
            *added,
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
    return pa.Table.from_batches([to_record_batch(source, first_sequence=first_sequence)])


def to_record_batch(batch: SequenceBatch, *, first_sequence: int = 0) -> pa.RecordBatch:
    """Return all rows of a batch as one record batch; its sequences are numbered from `first_sequence`."""
    return _record_batch(batch, np.arange(first_sequence, first_sequence + len(batch)))


def record_batches(
    reader: StoreReader,
    *,
    sequences: Sequence[int] | None = None,
    sequences_per_batch: int = SEQUENCES_PER_BATCH,
) -> pa.RecordBatchReader:
    """Return the rows of a reader's split as a stream of record batches; it holds one at a time.

    The result has `__arrow_c_stream__`, so duckdb and polars read it without a copy.

    Args:
        sequences: numbers of the sequences wanted, in this order; None: all.
        sequences_per_batch: how many are decoded together.
    """
    wanted = range(len(reader)) if sequences is None else sequences
    return pa.RecordBatchReader.from_batches(schema(reader.plan.columns), _batches(reader, wanted, sequences_per_batch))


def _batches(reader: StoreReader, wanted: Sequence[int], step: int) -> Iterator[pa.RecordBatch]:
    for first in range(0, len(wanted), step):
        numbers = np.asarray(wanted[first : first + step], dtype=np.int64)
        yield _record_batch(reader.read(numbers), numbers)


@dataclass(frozen=True, kw_only=True)
class SequenceRows:
    """Decoded rows of which each sequence is a slice: no copy, a few microseconds.

    Attributes:
        rows: all of them, with the columns of `schema()`.
        row_offset: int64 [S+1], where the rows of each sequence begin.
    """

    rows: pa.RecordBatch
    row_offset: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.row_offset) - 1

    def __getitem__(self, sequence: int) -> pa.RecordBatch:
        """Return the rows of one sequence, counted from 0 here. Raises IndexError beyond the last."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence}; there are {len(self)}")
        start, end = self.row_offset[sequence : sequence + 2].tolist()
        return self.rows.slice(start, end - start)


def shard_rows(reader: StoreReader, position: int) -> SequenceRows:
    """Decode one shard, number `position` of `reader.shards`, for looking at its sequences one by one.

    Raises:
        IndexError: there is no such shard.
        CorruptionError: it is damaged.
    """
    counts = [item.sequences for item in reader.shards]
    first = sum(counts[:position])
    batch = reader.read(range(first, first + counts[position]))
    return SequenceRows(rows=to_record_batch(batch, first_sequence=first), row_offset=batch.row_offset)


def to_parquet(rows: StoreReader | pa.RecordBatchReader, path: str | os.PathLike[str]) -> int:
    """Write the rows of a reader's split, or batches of them, into one Parquet file (zstd); return their number.

    Raises:
        UsageError: the file exists.
        OutOfSpaceError, StorageUnavailableError: it cannot be written; no partial file stays behind.
    """
    options = {"compression": "zstd", "use_dictionary": _DICTIONARY, "column_encoding": _SPLIT}
    batches = record_batches(rows) if isinstance(rows, StoreReader) else rows
    with whole_file(Path(path)) as file, pq.ParquetWriter(file, batches.schema, **options) as writer:
        written = 0
        for batch in batches:
            writer.write_batch(batch)
            written += int(batch.num_rows)
    return written


def row_keys(batch: SequenceBatch, number_S: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return document, sequence and position of each row, [R] each: the columns that name it."""
    token_R = np.flatnonzero(batch.has_row)
    sequence_R = batch.sequence_of_row
    return [batch.document[sequence_R], number_S[sequence_R], token_R - batch.token_offset[sequence_R]]


def _record_batch(batch: SequenceBatch, number_S: NDArray[np.int64]) -> pa.RecordBatch:
    token_R = np.flatnonzero(batch.has_row)
    sequence_R = batch.sequence_of_row
    row_columns, sequence_columns = batch.row_columns or {}, batch.sequence_columns or {}
    document_R, number_R, position_R = row_keys(batch, number_S)
    columns = [
        document_R,
        number_R,
        position_R.astype(np.int32),
        batch.tokens[token_R],
        batch.tokens[token_R + 1],
        _lists(
            interleave(batch.head_ids, batch.head_size, batch.tail_ids, batch.tail_size),
            batch.head_size + batch.tail_size,
        ),
        _lists(batch.logprob, batch.head_size),
        batch.head_size,
        _lists(batch.count, batch.tail_size),
        sigmoid(batch.tail_logit).astype(np.float32),
        batch.entropy,
        batch.next_logprob,
        *_by_temperature(batch),
        *row_columns.values(),
        *(values[sequence_R] for values in sequence_columns.values()),
    ]
    added = {name: {"axis": "row", "dtype": values.dtype.name} for name, values in row_columns.items()}
    added |= {name: {"axis": "sequence", "dtype": values.dtype.name} for name, values in sequence_columns.items()}
    kinds = schema(added)
    return pa.record_batch([_array(values, field) for values, field in zip(columns, kinds, strict=True)], kinds)


def _array(values: pa.Array | NDArray[np.generic], field: pa.Field) -> pa.Array:
    return (
        values
        if isinstance(values, pa.Array)
        else pa.array(values.astype(np.float32) if values.dtype == np.float16 else values, field.type)
    )


def _by_temperature(batch: SequenceBatch) -> list[pa.ListArray]:
    """Return the temperatures, and tail mass and entropy at each, as lists per row."""
    at = np.asarray(batch.temperatures, dtype=np.float32)
    if batch.tail_logit_T is None or batch.entropy_T is None:
        at = at[:0]
        tail_logit = entropy = np.zeros((batch.rows, 0), np.float32)
    else:
        tail_logit, entropy = batch.tail_logit_T, batch.entropy_T
    size_R = np.full(batch.rows, len(at), np.int32)
    return [
        _lists(values.reshape(-1), size_R)
        for values in (np.tile(at, batch.rows), sigmoid(tail_logit).astype(np.float32), entropy)
    ]


def _lists(values: NDArray[np.generic], size_R: NDArray[np.int32]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(row_starts(size_R).astype(np.int32)), pa.array(values))
