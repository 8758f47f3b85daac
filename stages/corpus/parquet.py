"""Source `parquet`: one document per row, the text in one column, read by row group straight from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.corpus.files import file_sha256, find_files
from stages.corpus.source import SourceSpec
from storage.errors import UsageError
from storage.plan import Json


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A run of rows that Parquet reads as one: rows first_row <= row < first_row + rows of the file."""

    path: Path
    index: int
    first_row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """Files in order, one document per row."""

    files: tuple[Path, ...]
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
        return {"paths": [str(path) for path in self.files]}

    @cached_property
    def _length(self) -> int:
        return sum(group.rows for group in self.groups)

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, end: int) -> list[str]:
        """Return the texts with first <= index < end."""
        texts: list[str] = []
        offset = 0
        for group in self.groups:
            low, high = max(first - offset, 0), min(end - offset, group.rows)
            offset += group.rows
            if low < high:
                texts.extend(_column(group, self.field).slice(low, high - low).to_pylist())
        return texts


@lru_cache(maxsize=2)  # a shard reads a row group in many small ranges
def _column(group: RowGroup, field: str) -> pa.ChunkedArray:
    return pq.ParquetFile(group.path).read_row_group(group.index, columns=[field]).column(0)


def open_parquet(spec: SourceSpec) -> ParquetFiles:
    """Open the files that `spec.path` names and check the column in each of them.

    Raises:
        UsageError: no file, not Parquet, no such column (the columns are listed), a column that is not text, or a
            null in it (file and row are named).
    """
    files = find_files(spec.path or "")
    groups = [group for path in files for group in _check(path, spec.field)]
    hashes = tuple(file_sha256(path) for path in files)
    return ParquetFiles(files=tuple(files), hashes=hashes, groups=tuple(groups), field=spec.field)


def _check(path: Path, field: str) -> Iterator[RowGroup]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"not a readable Parquet file: {error}", where=str(path)) from error
    schema = file.schema_arrow
    if field not in schema.names:
        raise UsageError(
            f"no column {field!r}; the columns are {', '.join(map(repr, schema.names))}",
            where=str(path),
            fix="set corpus.field to the column that holds the text",
        )
    if not _is_text(schema.field(field).type):
        raise UsageError(f"column {field!r} holds {schema.field(field).type}, not text", where=str(path))
    first_row = 0
    for index in range(file.num_row_groups):
        column = file.read_row_group(index, columns=[field]).column(0)
        refuse_nulls(column, f"{path}, row", first_row)
        yield RowGroup(path=path, index=index, first_row=first_row, rows=len(column))
        first_row += len(column)


def _is_text(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def refuse_nulls(column: pa.ChunkedArray, where: str, first_row: int) -> None:
    """Raise UsageError naming the first null of a column; rows count from 0, beginning at `first_row`."""
    if column.null_count:
        row = first_row + column.is_null().index(True).as_py()
        raise UsageError("a row has no text (null)", where=f"{where} {row}", fix="drop or repair the row")
