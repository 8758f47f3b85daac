"""Source `parquet`: one document per row, the text in one column, read by row group straight from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from stages.corpus.refusals import BadRecords, holds_conversations, not_text, note_nulls, other_kind
from stages.corpus.source import SourceSpec
from stages.input_files import FileState, file_sha256, find_files, unchanged
from storage.errors import UsageError
from storage.values import Json


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A run of rows that Parquet reads as one: rows first_row <= row < first_row + rows of the file."""

    file: FileState
    index: int
    first_row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """Files in order, one document per row."""

    files: tuple[FileState, ...]
    hashes: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    field: str

    @property
    def identity(self) -> Mapping[str, Json]:
        """What makes the content; see `Source`."""
        return {"kind": "parquet", "field": self.field, "files": list(self.hashes)}

    @property
    def recorded(self) -> Mapping[str, Json]:
        """What may differ for the same content; see `Source`."""
        return {"paths": [str(file.path) for file in self.files]}

    @cached_property
    def _length(self) -> int:
        return sum(group.rows for group in self.groups)

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end. Raises IdentityError if a file was changed since the scan."""
        texts: list[str] = []
        offset = 0
        for group in self.groups:
            low, high = max(first - offset, 0), min(end - offset, group.rows)
            offset += group.rows
            if low < high:
                with unchanged(group.file):
                    texts.extend(_column(group, self.field).slice(low, high - low).to_pylist())
        return texts


@lru_cache(maxsize=2)  # a shard reads a row group in many small ranges
def _column(group: RowGroup, field: str) -> pa.ChunkedArray:
    return pq.ParquetFile(group.file.path).read_row_group(group.index, columns=[field]).column(0)


def open_parquet(spec: SourceSpec) -> ParquetFiles:
    """Open the files that `spec.path` names and check the column in each of them.

    Raises:
        UsageError: no file, not Parquet, damaged (file and row group are named), no such column (the columns are
            listed), a column that is not text, or nulls in it (files and rows are named).
        IdentityError: a file was changed during the scan.
    """
    files = tuple(FileState.of(path) for path in find_files(spec.path or ""))
    groups: list[RowGroup] = []
    hashes: list[str] = []
    bad = BadRecords()
    for file in files:
        with unchanged(file):
            groups.extend(_check(file, spec.field, bad))
            hashes.append(file_sha256(file.path))
    bad.refuse()
    return ParquetFiles(files=files, hashes=tuple(hashes), groups=tuple(groups), field=spec.field)


def _check(state: FileState, field: str, bad: BadRecords) -> Iterator[RowGroup]:
    path = state.path
    try:
        with _readable(str(path)):
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
    except UsageError as error:
        with path.open("rb") as stream:
            beginning = stream.read(64)
        raise other_kind(beginning, str(path)) or error from error
    if field not in schema.names:
        raise UsageError(
            f"no column {field!r}; the columns are {', '.join(map(repr, schema.names))}",
            where=str(path),
            fix="set field to the column that holds the text",
        )
    if not _is_text(schema.field(field).type):
        kind = schema.field(field).type
        raise not_text(f"column {field!r} holds {kind}, not text", str(path), conversation=holds_conversations(kind))
    first_row = 0
    for index in range(file.num_row_groups):
        with _readable(f"{path}, row group {index}"):
            column = file.read_row_group(index, columns=[field]).column(0)
            column.validate(full=True)  # text that is not UTF-8 would else be found when its shard is read
        note_nulls(bad, column, name=field, file=str(path), first_row=first_row)
        yield RowGroup(file=state, index=index, first_row=first_row, rows=len(column))
        first_row += len(column)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn what Arrow says about damaged or foreign bytes into ours; it speaks in several kinds of exception."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"not a readable Parquet file: {reason}", where=where, fix="copy or write the file again"
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
